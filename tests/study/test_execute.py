"""Doing a study: on a tiny model, stopped and gone on with, with methods that fail."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from starmerge_models.cli import app
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.cache import ScoreCache
from starmerge_models.evaluation.runner import evaluate
from starmerge_models.merging.executors.ray import RayExecutor
from starmerge_models.merging.task_vectors import load_task_vectors
from starmerge_models.study.averages import Averages
from starmerge_models.study.execute import StudyRunner, code_hash, duration, run_study
from starmerge_models.study.store import HEAD, RUNS, load_store
from starmerge_models.study.study_file import PoolModel, Study, load_study
from tests.evaluation.tiny_world import World
from tests.forks import Forks
from tests.study.studies import ROWS, study_file

VARYING = ("merging", "asking", "date")

pytestmark = pytest.mark.usefixtures("small_fonts")


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """Return a study, and the store in which all of it is done, for tests that change neither."""
    folder = tmp_path_factory.mktemp("finished")
    study = load_study(study_file(world, folder / "in"))
    run_study(study, folder / "out")
    return study, folder / "out"


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a store without what differs from time to time."""
    found = map(json.loads, (folder / RUNS).read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in VARYING} for line in found]


def test_a_study_asks_what_an_evaluation_asks(
    world: World, finished: tuple[Study, Path], tmp_path: Path
) -> None:
    study, store = finished[0], load_store(finished[1])
    assert not store.failures
    assert len(store.records) == 1 + 3 + 3 * 3  # base; fine-tunes; two pairs and all three
    again = {"again": world.adapters["one"]}
    vectors = load_task_vectors(world.base, world.adapters | again)
    tasks = [task.model_copy() for task in world.tasks]
    update = vectors.merge("star", models=["one", "two", "again"])
    expected = evaluate(world.base, {"merge": update}, tasks, study.settings())
    pair = next(r for r in store.records if r.run.label == "star" and len(r.run.models) == 3)
    for task in tasks:
        credits_ = [p.credit for p in expected.scores["merge"][task.name].predictions]
        assert pair.by_task[task.name]["seen"] == credits_
        assert pair.by_task[task.name]["rows"] == ROWS
    base = next(r for r in store.records if r.run.kind == "base")
    for task in tasks:
        credits_ = [p.credit for p in expected.scores["base"][task.name].predictions]
        assert base.by_task[task.name]["seen"] == credits_
    tuned = [r for r in store.records if r.run.kind == "fine-tune"]
    assert [r.run.models for r in tuned] == [("one",), ("two",), ("again",)]
    assert all(record.lines[0]["score"] == 1 for record in tuned)  # the tasks are made of them
    assert {run.n for run in Averages(store).runs} == {2, 3}
    # Copies of one model leave its task whole.
    twice = study.model_copy(
        update={"numbers": (2,), "combinations": 9, "methods": study.methods[:1]}
    )
    averages = Averages(run_study(twice, tmp_path / "copies"))
    (copies,) = [run for run in averages.runs if run.record.run.models == ("one", "again")]
    assert copies.value == 1


def test_a_finished_study_opens_no_model(finished: tuple[Study, Path]) -> None:
    study, out = finished
    before = (out / RUNS).read_bytes()
    runner = StudyRunner(study, study.settings())
    store = run_study(study, out)
    assert (out / RUNS).read_bytes() == before
    assert "vectors" not in vars(runner)
    estimate = runner.estimate(store)
    assert (estimate.runs, estimate.done, estimate.rows) == (13, 13, 0)
    assert str(estimate) == "13 runs, 13 of them done; 0 to do, with 0 rows"


def test_a_finished_study_needs_no_cluster(finished: tuple[Study, Path]) -> None:
    pytest.importorskip("ray", reason="needs the extra: ray")
    study, out = finished
    before = (out / RUNS).read_bytes()
    runner = StudyRunner(study, study.settings())
    with runner.opened(out) as store:
        runner.run(store, executor=RayExecutor("192.0.2.1:1"))
    assert (out / RUNS).read_bytes() == before
    assert (out / HEAD).exists()


def test_options_of_the_cluster_are_checked(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra: ray")
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


def test_the_time_is_estimated_by_a_sample_or_by_what_was_done(
    finished: tuple[Study, Path],
) -> None:
    study, out = finished
    runner = StudyRunner(study, study.settings())
    fresh = runner.estimate(None)
    # The base and pairs of both tasks, three fine-tunes, merges of three.
    asked = sum(len(run.tasks) for run in runner.runs) * ROWS
    assert (fresh.done, fresh.rows) == (0, asked)
    assert fresh.seconds is not None
    assert fresh.seconds > 0
    store = load_store(out)
    grown = study.model_copy(update={"numbers": (1, 2, "all"), "combinations": 3})
    left = StudyRunner(grown, grown.settings()).estimate(store)
    assert left.done == 13
    known = [line for record in store.records for line in record.lines]
    per_row = sum(r.lines[0]["asking"] for r in store.records) / sum(o["rows"] for o in known)
    assert left.seconds is not None
    assert left.seconds >= left.rows * per_row
    assert "to do, with" in str(left)


def test_a_run_that_fails_is_recorded_and_the_others_go_on(world: World, tmp_path: Path) -> None:
    plugin = tmp_path / "in" / "broken.py"
    plugin.parent.mkdir()
    plugin.write_text(
        "from pathlib import Path\n"
        "from starmerge_models.methods.method import Merge, method\n\n\n"
        "@method('broken')\n"
        "class Broken(Merge):\n"
        "    def merge(self, deltas, tensor, survey):\n"
        "        if Path(__file__).with_name('mended').exists():\n"
        "            return next(iter(deltas))\n"
        "        raise RuntimeError('it broke\\nhere')\n"
    )
    file = study_file(
        world,
        tmp_path / "in",
        methods=["average", "./broken.py:Broken", "star", {"method": "slerp"}],
        numbers=["all"],
    )
    study = load_study(file)
    store = run_study(study, tmp_path / "out")
    errors = {r.run.label.rpartition(":")[2]: r.error for r in store.failures}
    assert errors["Broken"] == "RuntimeError: it broke here"
    assert errors.keys() == {"Broken", "slerp"}
    assert {run.label for run in Averages(store).runs} == {"average", "star"}
    # Failed runs are made again on request alone.
    (plugin.parent / "mended").touch()
    assert len(run_study(study, tmp_path / "out").failures) == 2
    assert [r.run.method for r in run_study(study, tmp_path / "out", retry=True).failures] == [
        "slerp"
    ]


def test_a_study_that_cannot_begin_leaves_nothing(world: World, tmp_path: Path) -> None:
    study = load_study(study_file(world, tmp_path / "in"))
    for changes, said in (
        ({"base": "./nowhere/at/all"}, "does not exist"),
        ({"scorer": "guess"}, "scorer 'guess' is unknown"),
        ({"numbers": (9,)}, "its pool has 3"),
    ):
        changed = study.model_copy(update=changes)
        with pytest.raises(StarmergeError, match=said):
            run_study(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for place in (world.base / "runs", world.adapters["one"]):
        with pytest.raises(UsageError, match="is inside the model"):
            run_study(study, place)
    broken = tmp_path / "broken"
    shutil.copytree(world.adapters["one"], broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    changed = study.model_copy(
        update={"models": study.models | {"one": PoolModel(path=str(broken), task="one")}}
    )
    with pytest.raises(StarmergeError, match="adapter_model.safetensors"):
        run_study(changed, tmp_path / "out")
    assert not (tmp_path / "out" / RUNS).exists()


def test_what_decides_scores_is_in_the_head(world: World, tmp_path: Path) -> None:
    study = load_study(study_file(world, tmp_path / "in", numbers=["all"]))
    run_study(study, tmp_path / "out")
    head = json.loads((tmp_path / "out" / HEAD).read_text())
    assert head["code"] == code_hash()
    assert head["base"]["name"] == "base"
    assert head["models"]["again"]["task"] == "one"
    assert head["models"]["again"]["files"] == head["models"]["one"]["files"]
    assert head["asked"] == {"scorer": "rank", "matching": "strict", "dtype": "float32"}
    assert str(tmp_path) not in (tmp_path / "out" / HEAD).read_text()
    assert str(world.base) not in (tmp_path / "out" / HEAD).read_text()
    # Other rows are another task.
    fewer = study.model_copy(update={"rows": ROWS - 1})
    with pytest.raises(UsageError, match=r"a change of: tasks \(one, two\)"):
        run_study(fewer, tmp_path / "out")


def test_answers_that_were_given_once_are_not_asked_for_again(world: World, tmp_path: Path) -> None:
    study = load_study(study_file(world, tmp_path / "in", numbers=["all"], methods=["star"]))
    cache = ScoreCache(tmp_path / "cache")
    run_study(study, tmp_path / "one", cache=cache)
    size = cache.size
    run_study(study, tmp_path / "two", cache=cache)
    assert cache.size == size > 0
    assert lines(tmp_path / "one") == lines(tmp_path / "two")


def test_killed_at_any_moment_a_study_goes_on_to_the_same_store(
    world: World, tmp_path: Path, loaded: Forks
) -> None:
    file = study_file(world, tmp_path / "in", methods=["average"], figures=[])
    run_study(load_study(file), tmp_path / "whole")
    command = ["study", file, "-o", tmp_path / "killed", "--no-cache"]
    size, store = (tmp_path / "whole" / RUNS).stat().st_size, tmp_path / "killed" / RUNS
    codes = []
    for part in range(4):
        with loaded.running(command) as (process, ending):
            while not (store.exists() and store.stat().st_size >= size * part // 4):
                assert not ending.done(), ending.result()
                time.sleep(0.001)
            os.kill(process, signal.SIGKILL)
        codes.append(ending.result().code)
        # The last line of a process that is killed may be cut off.
        with store.open("r+b") as stream:
            stream.truncate(max(0, store.stat().st_size - 7))
    assert codes == [-signal.SIGKILL] * 4
    assert loaded.run(command).code == 0
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_the_command_runs_a_study_goes_on_with_it_and_draws_it(
    world: World, tmp_path: Path
) -> None:
    file = study_file(world, tmp_path / "in", numbers=["all"], methods=["average", "star"])
    out = tmp_path / "out"

    def said(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["study", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    assert "numbers" in said()
    shown = said(file)
    assert "Fine-tunes: one, two, again" in shown
    assert "6 runs, 2 of them merges." in shown
    assert "6 runs, 0 of them done; 6 to do, with 108 rows" in said(file, "--dry-run")
    assert not out.exists()
    table = said(file, "-o", out, "--no-cache")
    assert "| *base*" in table
    assert (out / "table.md").read_text() in table
    grown = said(file, "-o", out, "--numbers", "2,all", "--no-cache")
    assert "n = 2" in grown
    assert said(out) == grown
    assert "10 runs, 10 of them done" in said(
        file, "-o", out, "--numbers", "2,all", "--dry-run", "--no-cache"
    )
    refused = CliRunner().invoke(app, ["study", str(out), "-o", str(tmp_path / "else")])
    assert isinstance(refused.exception, UsageError)
    wrong = CliRunner().invoke(app, ["study", str(file), "-o", str(out), "--numbers", "two"])
    assert isinstance(wrong.exception, UsageError)
    assert "numbers" in str(wrong.exception)


def test_a_study_goes_on_in_a_folder_of_its_own_name(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the manual has it: starmerge study eta -o eta.
    file = study_file(world, tmp_path, numbers=["all"], methods=["average"])
    study = load_study(file)
    monkeypatch.setattr("starmerge_models.study.study_file.studies", lambda: {"tiny": study})
    monkeypatch.chdir(tmp_path)
    command = ["study", "tiny", "-o", "tiny", "--no-cache"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    runs = Path("tiny", "runs.jsonl").read_bytes()
    assert CliRunner().invoke(app, command).output == first.output
    assert Path("tiny", "runs.jsonl").read_bytes() == runs
    assert "5 of them done" in CliRunner().invoke(app, [*command, "--dry-run"]).output
    assert (
        "5 runs, 0 of them done" in CliRunner().invoke(app, ["study", "tiny", "--dry-run"]).output
    )
    assert CliRunner().invoke(app, ["study", "tiny"]).output == first.output


def test_times_are_told_in_words() -> None:
    assert [duration(s) for s in (3, 89, 100, 3600, 7500)] == [
        "3 s", "89 s", "2 min", "1 h 0 min", "2 h 5 min",
    ]  # fmt: skip
