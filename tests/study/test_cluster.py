"""A study whose runs are made by the workers of a Ray cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from starmerge_models.cli import app
from starmerge_models.merging.executors.ray import RayExecutor
from starmerge_models.study.execute import StudyRunner, run_study
from starmerge_models.study.store import HEAD, RUNS
from starmerge_models.study.study_file import load_study
from tests.evaluation.tiny_world import make_world
from tests.study.studies import study_file
from tests.study.test_execute import lines

pytest.importorskip("ray", reason="needs the extra: ray")

_PLUGIN = """
import os, signal
from pathlib import Path
from starmerge_models.methods.method import Merge, method

@method('unlucky')
class Unlucky(Merge):
    def merge(self, deltas, tensor, survey):
        file = Path(__file__).with_name('kill')
        if file.exists():
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return next(iter(deltas))
"""


def test_workers_make_the_runs_that_one_process_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    world = make_world(tmp_path / "world")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "unlucky.py").write_text(_PLUGIN)
    file = study_file(
        world,
        tmp_path / "in",
        methods=["average", "star", "slerp", "./unlucky.py:Unlucky"],
        numbers=["all"],
    )
    study = load_study(file)
    local = run_study(study, tmp_path / "local")
    # The store has some of the runs already, and a worker is killed while it makes another.
    runner = StudyRunner(study, study.settings())
    folder = tmp_path / "far"
    with runner.opened(folder) as store:
        for number in (0, 2):
            store.add(runner.runs[number], runner.lines(number))
        (tmp_path / "in" / "kill").touch()
        runner.run(store, executor=RayExecutor(threads=2, places=1))
    assert not (tmp_path / "in" / "kill").exists()

    def key(line: dict[str, object]) -> str:
        return repr(sorted(line.items(), key=str))

    assert sorted(lines(folder), key=key) == sorted(lines(tmp_path / "local"), key=key)
    assert len(store.failures) == len(local.failures) == 1  # slerp takes two models
    # A study that is done needs no cluster.
    before = (folder / RUNS).read_bytes()
    with runner.opened(folder) as store:
        runner.run(store, executor=RayExecutor("192.0.2.1:1"))
    assert (folder / RUNS).read_bytes() == before
    assert (folder / HEAD).exists()


def test_options_of_the_cluster_are_checked(tmp_path: Path) -> None:
    run = CliRunner(env={"COLUMNS": "200"}).invoke
    for options, said in (
        (("--address", "auto"), "Add --executor ray"),
        (("--threads", "2"), "--threads is of --executor ray"),
        (("--executor", "ray", "--address", "ray://head:1"), "Ray Client"),
    ):
        result = run(app, ["study", "numbers", "-o", str(tmp_path / "out"), *options])
        assert result.exception is not None
        assert said in str(result.exception)
    assert not (tmp_path / "out").exists()
