"""Merges and studies on a real Ray cluster of this machine: two nodes, three worker processes.

Starting a cluster takes seconds, and so does each worker that is killed. So all that needs a
cluster stands here, and has the same one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import starmerge_models as sm
from starmerge_models.cli.clean import clean
from starmerge_models.errors import Interrupted, StarmergeError, UsageError, WorkersLostError
from starmerge_models.events import PhaseFinished, Published, Retry
from starmerge_models.merging import journal
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors import ray as ray_executor
from starmerge_models.merging.executors import schedule
from starmerge_models.merging.executors.executor import FunctionJob
from starmerge_models.merging.executors.ray import RayExecutor
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.journal import JOURNAL, fingerprint
from starmerge_models.merging.plan import Plan, make_plan
from starmerge_models.merging.ranks import rank_costs
from starmerge_models.merging.work import SurveyJob
from starmerge_models.storage import requests
from starmerge_models.storage.leftovers import leftovers
from starmerge_models.storage.local_folder import LocalFolder
from starmerge_models.storage.places import place_of
from starmerge_models.storage.remote import remote_storage
from starmerge_models.study.execute import StudyRunner, run_study
from starmerge_models.study.study_file import load_study
from tests.conftest import MakeAdapter, MakeFinetune
from tests.evaluation.tiny_world import make_world
from tests.forks import Forks, tree
from tests.merging.executors.cluster import (
    BUCKET,
    KEYS,
    OUTPUT,
    PLUGIN,
    TENSOR,
    URL,
    Cluster,
    alive,
    cluster,
    kept,
    merged_twice,
    plan_of,
    wait_until,
)
from tests.storage.object_server import Fault, Request
from tests.storage.test_objects import assert_same
from tests.study.studies import study_file
from tests.study.test_execute import lines

ray = pytest.importorskip("ray", reason="needs the extra: ray")

_CASES = {
    "model": ("star+ties", {"star.eta": 60}, "model"),
    "adapter": ("average", {}, "adapter"),
    "unified": ("emr", {}, "unified"),
    "survey": ("metagpt", {}, "model"),
    "post-step": ("shares+own_response", {}, "model"),
    "random": ("dare+linear", {"dare.seed": 3}, "model"),
}


@pytest.fixture(scope="module")
def started() -> Iterator[Cluster]:
    with cluster() as own:
        yield own


@pytest.fixture(scope="module")
def workers(started: Cluster) -> RayExecutor:
    return started.workers


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's tensors would all be one group."""
    monkeypatch.setattr(schedule, "LEAST", 1)


@pytest.mark.parametrize("case", _CASES)
def test_workers_write_the_same_bytes(
    case: str,
    workers: RayExecutor,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
) -> None:
    method, parameters, kind = _CASES[case]
    other = make_adapter("b", seed=1) if kind == "adapter" else make_finetune("b", seed=1)
    models = [make_adapter("a"), other]

    def plan(output: Path) -> Plan:
        return plan_of(tiny_base, models, output, method, parameters, kind)

    local, far = merged_twice(workers, tmp_path, plan)
    assert local == far
    assert JOURNAL not in far


def test_ranks_are_measured_by_workers(
    workers: RayExecutor, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    plan = plan_of(tiny_base, models, tmp_path / "out", "star", {}, "adapter")
    assert rank_costs(plan, kept(workers)) == rank_costs(plan, Threads(1))


@pytest.fixture
def unlucky(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], Plan]:
    """Return what plans a merge by the plug-in, which does what files beside it say."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(PLUGIN)
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    return lambda output: plan_of(tiny_base, models, output, "own.py:Unlucky", {}, "model")


def test_a_worker_that_hangs_holds_up_nothing(
    workers: RayExecutor,
    unlucky: Callable[[Path], Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_executor, "PATIENCE", 1.0)
    monkeypatch.setattr(ray_executor, "_TICK", 0.2)
    local = tree(run(unlucky(tmp_path / "local" / "out"), Threads(1)).path)
    (tmp_path / "stop").write_text(TENSOR)
    far = tree(run(unlucky(tmp_path / "ray" / "out"), kept(workers)).path)
    assert far == local
    stopped = int((tmp_path / "pid").read_text())
    assert stopped != os.getpid()
    wait_until(lambda: not alive(stopped))


def test_what_a_killed_worker_had_in_hand_is_done_again(
    workers: RayExecutor,
    unlucky: Callable[[Path], Plan],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    local = tree(run(unlucky(tmp_path / "local" / "out"), Threads(1)).path)
    (tmp_path / "kill").write_text(TENSOR)
    far = tree(run(unlucky(tmp_path / "ray" / "out"), kept(workers)).path)
    assert (tmp_path / "kill-done").exists()
    (retry,) = [record.msg for record in caplog.records if isinstance(record.msg, Retry)]
    assert TENSOR in retry.what
    assert (retry.attempt, retry.reason[-8:]) == (1, "was lost")
    assert far == local
    assert len(workers.workers) == 3


def test_a_tensor_that_kills_every_worker_is_named_and_the_rest_is_kept(
    workers: RayExecutor,
    unlucky: Callable[[Path], Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schedule, "DEATHS", 2)
    monkeypatch.setattr(journal, "_SECONDS", 0.0)
    (tmp_path / "patient").touch()
    (tmp_path / "kill").write_text(TENSOR)
    (tmp_path / "always").touch()
    output = tmp_path / "ray" / "out"
    with pytest.raises(WorkersLostError, match=f"2 workers .*{TENSOR}.*is kept in"):
        run(unlucky(output), kept(workers))
    assert not output.exists()
    (left,) = leftovers(output)
    (tmp_path / "kill").unlink()
    result = run(unlucky(output), Threads(1))
    assert result.resumed > 0
    assert not left.path.exists()
    assert tree(result.path) == tree(run(unlucky(tmp_path / "local" / "out"), Threads(1)).path)


def test_errors_of_workers_are_those_of_the_merge(
    workers: RayExecutor, tiny_base: Path, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    models = [make_finetune("a", scale=float("nan"))]
    plan = plan_of(tiny_base, models, tmp_path / "out", "average", {}, "model")
    with pytest.raises(sm.StarmergeError, match="has a NaN") as caught:
        run(plan, kept(workers))
    assert type(caught.value) is sm.StarmergeError
    assert "work.py" in str(caught.value.__cause__)  # the worker's traceback
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path / "out") == []


def test_errors_that_cannot_be_sent_say_the_same(workers: RayExecutor) -> None:
    # What is defined here is sent by value: workers need not import this module.
    class UnpicklableError(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(first + second)

    def fail(number: int) -> int:
        raise UnpicklableError("broken", " here")

    with pytest.raises(RuntimeError, match="UnpicklableError: broken here"):
        list(workers.run(FunctionJob(fail, lambda number: 0), range(5)))


def test_the_memory_of_a_machine_bounds_what_is_in_work_there(
    workers: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(number: int) -> tuple[str, float, float]:
        begin = time.time()
        time.sleep(0.1)
        return ray.get_runtime_context().get_node_id(), begin, time.time()

    monkeypatch.setattr(workers, "memory", 1)
    by_node: dict[str, list[tuple[float, float]]] = {}
    job = FunctionJob(work, lambda number: 10)
    for node, begin, end in workers.run(job, range(12)):
        by_node.setdefault(node, []).append((begin, end))
    for own in by_node.values():
        own.sort()
        assert all(first[1] <= second[0] for first, second in pairwise(own))


def test_a_signal_inside_of_rays_own_code_comes_through(
    workers: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a handler raises while Ray waits, Ray wraps, if it comes at an unlucky moment."""
    wait, calls = ray.wait, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise SystemError("returned a result with an exception set") from Interrupted(2)
        return wait(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ray, "wait", interrupted)
        list(workers.run(FunctionJob(lambda number: number, lambda number: 0), range(9)))
    job = FunctionJob(lambda number: number, lambda number: 0)
    assert list(workers.run(job, range(9))) == [*range(9)]


def test_warnings_of_workers_are_logged_by_the_driver(
    workers: RayExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    def work(number: int) -> int:
        logging.getLogger("starmerge_models.device").warning("the card is full")
        warnings.warn("a library said so", stacklevel=1)
        return number

    assert list(workers.run(FunctionJob(work, lambda number: 0), [7])) == [7]
    assert "the card is full" in caplog.text
    assert "a library said so" in caplog.text


def test_a_machine_that_does_not_reach_the_files_is_told_at_the_start(
    workers: RayExecutor, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    class Elsewhere(FunctionJob[int]):
        def check(self) -> None:
            raise sm.StarmergeError("/data/base cannot be reached from here.")

    with pytest.raises(sm.StarmergeError, match="cannot be reached"):
        list(workers.run(Elsewhere(lambda number: number, lambda number: 0), range(3)))
    adapter = make_adapter("a")
    plan = plan_of(tiny_base, [adapter], tmp_path / "out", "average", {}, "model")
    mark = tmp_path / "journal.jsonl"
    job = SurveyJob(plan, mark=(mark, "this run"), visit=lambda deltas, tensor: None)
    with pytest.raises(sm.StarmergeError, match=r"journal.jsonl cannot be reached .*storage"):
        job.check()
    mark.write_text('{"run": "another run"}')
    with pytest.raises(sm.StarmergeError, match="is another folder here"):
        job.check()
    mark.write_text('{"run": "this run"}')
    job.check()
    (weights,) = adapter.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(sm.StarmergeError, match=r"adapter_model.safetensors has \d+ bytes here"):
        job.check()
    weights.unlink()
    with pytest.raises(sm.StarmergeError, match="adapter_model.safetensors cannot be reached"):
        replace(job, mark=None).check()


def test_other_packages_are_refused(workers: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ray_executor.installed_versions(ray_executor.PACKAGES)
    monkeypatch.setattr(ray_executor, "installed_versions", lambda _: ours | {"torch": "1.0"})
    with pytest.raises(sm.StarmergeError, match=r"torch .* there and 1\.0 here"):
        list(workers.run(FunctionJob(lambda number: number, lambda number: 0), range(3)))


def test_files_of_a_shared_folder_are_written_synchronously(tmp_path: Path) -> None:
    for folder, expected in ((LocalFolder(tmp_path), 0), (LocalFolder(tmp_path).shared(), 1)):
        file = pickle.loads(pickle.dumps(folder)).open("shard", 8)
        file.write(memoryview(b"abcdefgh"), 0)
        flags = fcntl.fcntl(file._file, fcntl.F_GETFL)
        assert bool(flags & os.O_DSYNC) == bool(expected)
        source = tmp_path / "source"
        source.write_bytes(b"0123456789")
        file.copy(source, 2, 4, 3)
        file.close()
        assert (tmp_path / "shard").read_bytes() == b"abc2345h"


def test_wrong_addresses_are_refused() -> None:
    with pytest.raises(UsageError, match="Ray Client"):
        RayExecutor("ray://head:10001")
    for wrong in ("", "local", "head", "head:", "head:port", "http//head:1"):
        with pytest.raises(UsageError, match="Give auto or HOST:PORT"):
            RayExecutor(wrong)
    with pytest.raises(UsageError, match="threads"):
        RayExecutor(threads=0)
    with pytest.raises(UsageError, match="memory"):
        RayExecutor(memory="many")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "nowhere.invalid:6379"])
def test_a_cluster_that_is_not_there_is_told_at_once(
    address: str, starmerge: Callable[..., subprocess.CompletedProcess[str]], tiny_base: Path
) -> None:
    """Ray is not asked: it would try for ten minutes, and write lines of its own meanwhile."""
    command = ("merge", tiny_base, tiny_base, "-o", "out", "--executor", "ray", "--log", "json")
    finished = starmerge(*command, "--address", address)
    last = [json.loads(line) for line in finished.stderr.splitlines()][-1]
    assert finished.returncode == last["exit_code"] == 2
    assert f"There is no Ray cluster at '{address}'" in last["message"]


@pytest.fixture
def world(started: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", started.ours.endpoint)
    monkeypatch.setenv("STARMERGE_SCRATCH", str(tmp_path / "scratch"))
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    # A process opens a bucket once, and this one has other endpoints in other tests.
    requests._store.cache_clear()
    remote_storage.cache_clear()
    for proxy in (started.ours, started.theirs):
        proxy.taken.clear()
        proxy.served.clear()
        proxy.plan = lambda request: None
    yield started
    for name in started.files(""):
        started.client.delete_object(Bucket=BUCKET, Key=name)


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """Return a base whose file goes in parts: one tensor has 20 MB that no model changes."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["large"] = torch.arange(5_000_000, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["model", "unified", "adapter", "gguf"])
def test_workers_send_what_they_write(
    kind: str,
    world: Cluster,
    base: Path,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
) -> None:
    is_adapter = kind in ("adapter", "gguf")
    if kind == "model":
        models = [make_adapter("a"), make_adapter("b", seed=1)]
    else:
        base = tiny_base
        other = make_adapter("b", seed=1) if is_adapter else make_finetune("b", seed=1)
        models = [make_adapter("a"), other]
    method = "emr" if kind == "unified" else "star"
    run(plan_of(base, models, tmp_path / "out", method, kind=kind), Threads(1))
    run(plan_of(base, models, OUTPUT, method, kind=kind), kept(world.workers))
    assert_same(world.files("out/"), tmp_path / "out")
    assert world.files(".out") == {}
    assert list((tmp_path / "scratch").iterdir()) == []
    if not is_adapter:  # an adapter's factors are cut to one rank by the driver
        weights = {"model": "model", "unified": "unified/model"}[kind] + ".safetensors"
        size = (tmp_path / "out" / weights).stat().st_size
        of_workers = sum(n for key, n in world.theirs.taken.items() if weights in key)
        of_driver = sum(n for key, n in world.ours.taken.items() if weights in key)
        assert of_driver < 8 * 1024  # its header
        assert of_workers == 2 * size - of_driver  # as pieces, and once more whole
        assert not any(weights in key for key in world.ours.served)


def test_an_adapter_as_one_file(
    world: Cluster, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="needs the extra: gguf")
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    run(plan_of(tiny_base, models, tmp_path / "out.gguf", kind="gguf"), Threads(1))
    run(plan_of(tiny_base, models, place_of(f"{URL}.gguf"), kind="gguf"), kept(world.workers))
    assert world.files("out.gguf") == {"": (tmp_path / "out.gguf").read_bytes()}
    assert world.files(".out") == {}


def test_an_old_merge_of_the_same_sizes_is_replaced(
    world: Cluster,
    base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While files of both lie there, no report says that they are a whole merge."""
    old, new = [make_adapter("a")], [make_adapter("b", seed=1)]
    run(plan_of(base, old, OUTPUT), kept(world.workers))
    before = world.files("out/")
    reports: list[bool] = []

    def look(request: Request) -> None:
        if request.key == "out/model.safetensors":
            reports.append("merge_report.json" in world.files("out/"))

    world.theirs.plan = look
    plan = make_plan(plan_of(base, new, place_of(f"{URL}-")).recipe, OUTPUT, overwrite=True)
    caplog.set_level(logging.DEBUG, "starmerge_models")
    run(plan, kept(world.workers))
    after = world.files("out/")
    assert len(after["model.safetensors"]) == len(before["model.safetensors"])
    assert after["model.safetensors"] != before["model.safetensors"]
    assert reports
    assert not any(reports)
    run(plan_of(base, new, tmp_path / "out"), Threads(1))
    assert_same(after, tmp_path / "out")
    told = [record.msg for record in caplog.records]
    published = [event.path for event in told if isinstance(event, Published)]
    assert published[0] == URL  # and then the local one
    uploaded = [e.done for e in told if isinstance(e, PhaseFinished) and e.phase == "uploading"]
    assert uploaded == [sum(map(len, after.values()))]


def test_a_failed_upload_is_repeated_from_the_pieces(
    world: Cluster,
    base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = [make_adapter("a")]
    run(plan_of(base, models, tmp_path / "out"), Threads(1))

    def refuse(request: Request) -> Fault | None:
        is_weights = request.method == "POST" and request.key == "out/model.safetensors"
        return Fault(status=403, code="AccessDenied") if is_weights else None

    world.theirs.plan = refuse
    with pytest.raises(StarmergeError, match=r"refuses the credentials.*The merge itself is whole"):
        run(plan_of(base, models, OUTPUT), kept(world.workers))
    assert world.files("out/") == {}
    clean(Path(URL))
    lines = capsys.readouterr().out.splitlines()
    assert sum("(left over)" in line for line in lines) == 2
    assert any("s3://shared/.out.partial-" in line for line in lines)
    world.theirs.plan = lambda request: None
    world.theirs.taken.clear()
    result = run(plan_of(base, models, OUTPUT), kept(world.workers))
    assert result.resumed > 0
    assert {key.partition("/")[0] for key in world.theirs.taken} == {"out"}
    assert_same(world.files("out/"), tmp_path / "out")
    assert world.files(".out") == {}


def test_missing_pieces_are_found_before_anything_appears(
    world: Cluster, base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    models = [make_adapter("a")]
    world.theirs.plan = lambda request: (
        Fault(status=403, code="AccessDenied") if request.key == "out/model.safetensors" else None
    )
    with pytest.raises(StarmergeError, match="The merge itself is whole"):
        run(plan_of(base, models, OUTPUT), kept(world.workers))
    world.theirs.plan = lambda request: None
    pieces = sorted(key for key in world.files(".out") if "+" in key)
    world.client.delete_object(Bucket=BUCKET, Key=f".out{pieces[len(pieces) // 2]}")
    with pytest.raises(StarmergeError, match=r"lacks pieces of model\.safetensors.*--fresh"):
        run(plan_of(base, models, OUTPUT), kept(world.workers))
    assert world.files("out/") == {}
    run(plan_of(base, models, OUTPUT), kept(world.workers), fresh=True)
    run(plan_of(base, models, tmp_path / "out"), Threads(1))
    assert_same(world.files("out/"), tmp_path / "out")


def test_what_was_sent_is_taken_up_by_workers_alone(
    world: Cluster,
    base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(PLUGIN)
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    method = "own.py:Unlucky"
    monkeypatch.setattr(schedule, "DEATHS", 1)
    monkeypatch.setattr(journal, "_SECONDS", 0.0)
    (tmp_path / "patient").touch()
    (tmp_path / "kill").write_text(TENSOR)
    with pytest.raises(WorkersLostError, match="is kept in"):
        run(plan_of(base, models, OUTPUT, method), kept(world.workers))
    assert world.files("out/") == {}
    sent, scratch = world.files(".out"), tmp_path / "scratch"
    assert sent
    shutil.copytree(scratch, tmp_path / "kept")
    run(plan_of(base, models, tmp_path / "out", method), Threads(1))
    for executor, is_taken_up in ((Threads(1), False), (kept(world.workers), True)):
        result = run(plan_of(base, models, OUTPUT, method), executor)
        # Threads of this machine write files here, where none of the pieces is.
        assert (result.resumed > 0) == is_taken_up
        assert_same(world.files("out/"), tmp_path / "out")
        assert world.files(".out") == {}
        # All lies there again as before.
        for name in world.files("out/"):
            world.client.delete_object(Bucket=BUCKET, Key=f"out/{name}")
        for name, content in sent.items():
            world.client.put_object(Bucket=BUCKET, Key=f".out{name}", Body=content)
        shutil.copytree(tmp_path / "kept", scratch, dirs_exist_ok=True)


def test_workers_go_on_with_what_threads_have_left(
    loaded: Forks,
    world: Cluster,
    base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store has none of it, not even the zeros that a hole in a file would be read as."""
    weights = base / "model.safetensors"
    tensors = {"a.zeros": torch.zeros(1000), **load_file(weights)}
    save_file(tensors, weights, metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(PLUGIN)
    (tmp_path / "kill").write_text(TENSOR)
    models = [make_adapter("a")]
    plan = plan_of(base, models, OUTPUT, "own.py:Unlucky")
    command = ["merge", base, *models, "-m", "own.py:Unlucky", "-o", URL, "--threads", "1"]
    killed = loaded.run(command, env=dict(os.environ), cwd=str(tmp_path), side_by_side=True)
    assert killed.code == -signal.SIGKILL
    (left,) = (tmp_path / "scratch").glob(f".out~*{fingerprint(plan)}*")
    assert b'"tensor"' in (left / JOURNAL).read_bytes()
    assert run(plan, kept(world.workers)).resumed == 0
    local = plan_of(base, models, tmp_path / "out", "own.py:Unlucky")
    run(local, Threads(1))
    assert_same(world.files("out/"), tmp_path / "out")
    assert world.files(".out") == {}


def test_a_merge_that_fails_leaves_no_pieces(
    world: Cluster, tiny_base: Path, make_finetune: MakeFinetune
) -> None:
    models = [make_finetune("a", scale=float("nan"))]
    with pytest.raises(StarmergeError, match="has a NaN"):
        run(plan_of(tiny_base, models, OUTPUT, "average"), kept(world.workers))
    assert world.files("") == {}


def test_workers_without_access_are_told_at_the_start(
    world: Cluster, base: Path, make_adapter: MakeAdapter
) -> None:
    world.theirs.plan = lambda request: Fault(status=403, code="AccessDenied")
    with pytest.raises(StarmergeError, match="refuses the credentials"):
        run(plan_of(base, [make_adapter("a")], OUTPUT), kept(world.workers))
    assert world.files("") == {}


_ONCE = """
import os, signal
from pathlib import Path
from starmerge_models.methods.method import Merge, method

@method('once')
class Once(Merge):
    def merge(self, deltas, tensor, survey):
        file = Path(__file__).with_name('kill')
        if file.exists():
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return next(iter(deltas))
"""


def test_workers_make_the_runs_of_a_study_that_one_process_makes(
    workers: RayExecutor, tmp_path: Path
) -> None:
    world = make_world(tmp_path / "world")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "once.py").write_text(_ONCE)
    methods = ["average", "star", "slerp", "./once.py:Once"]
    study = load_study(study_file(world, tmp_path / "in", methods=methods, numbers=["all"]))
    local = run_study(study, tmp_path / "local")
    # The store has some of the runs already, and a worker is killed while it makes another.
    runner = StudyRunner(study, study.settings())
    folder = tmp_path / "far"
    with runner.opened(folder) as store:
        for number in (0, 2):
            store.add(runner.runs[number], runner.lines(number))
        (tmp_path / "in" / "kill").touch()
        for worker in workers.workers[2:]:  # each has to import what evaluations need
            workers.stop_worker(worker)
        runner.run(store, executor=kept(workers))
    assert not (tmp_path / "in" / "kill").exists()

    def key(line: dict[str, object]) -> str:
        return repr(sorted(line.items(), key=str))

    assert sorted(lines(folder), key=key) == sorted(lines(tmp_path / "local"), key=key)
    assert len(store.failures) == len(local.failures) == 1  # slerp takes two models


def command(plan: Plan, *options: str) -> list[str]:
    """Return the command line of a merge by the plug-in."""
    models = [str(entry.path) for entry in plan.recipe.models]
    arguments = ["merge", str(plan.recipe.base), *models, "-m", "own.py:Unlucky"]
    return [*arguments, "-o", str(plan.path), "--executor", "ray", *options]


def test_a_killed_driver_takes_its_workers_along_and_the_merge_goes_on(
    loaded: Forks, started: Cluster, unlucky: Callable[[Path], Plan], tmp_path: Path
) -> None:
    output = tmp_path / "ray" / "out"
    plan = unlucky(output)
    written = output.parent / f".out.partial-{fingerprint(plan)}" / JOURNAL
    (tmp_path / "block").touch()
    workers = started.workers
    for worker in list(workers.workers):  # they hold the processors
        workers.stop_worker(worker)
    line = command(plan, "--address", str(workers.address), "--threads", "1")
    with loaded.running(line, cwd=str(tmp_path), side_by_side=True) as (driver, ending):
        wait_until(lambda: written.exists() and b'"tensor"' in written.read_bytes())
        wait_until(lambda: list(tmp_path.glob("pid-*")))  # what is copied is written before
        os.kill(driver, signal.SIGKILL)
    assert ending.result().code == -signal.SIGKILL
    pids = [int(file.name.partition("-")[2]) for file in tmp_path.glob("pid-*")]
    assert pids
    wait_until(lambda: not any(map(alive, pids)))
    assert not output.exists()
    (tmp_path / "block").unlink()
    result = run(unlucky(output), Threads(1))
    assert result.resumed > 0
    assert tree(result.path) == tree(run(unlucky(tmp_path / "local" / "out"), Threads(1)).path)


def test_ctrl_c_leaves_no_process(
    loaded: Forks,
    unlucky: Callable[[Path], Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "slow").touch()
    output = tmp_path / "ray" / "out"
    mark = tmp_path.name + str(os.getpid())
    line = command(unlucky(output), "--threads", "1")
    # As in a terminal, where Ctrl-C reaches all processes of the group.
    options = {"env": {"STARMERGE_TEST": mark}, "cwd": str(tmp_path), "own_group": True}
    with loaded.running(line, side_by_side=True, **options) as (driver, ending):
        wait_until(lambda: list(tmp_path.glob("pid-*")))
        os.killpg(driver, signal.SIGINT)
    ended = ending.result()
    assert ended.code == 130
    assert ended.err == "Stopped by Ctrl-C. No partial output was left.\n"

    def others() -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                content = (folder / "environ").read_bytes()
                if f"STARMERGE_TEST={mark}".encode() in content and alive(int(folder.name)):
                    found.append(int(folder.name))
        return found

    wait_until(lambda: not others())
    assert leftovers(output) == []
