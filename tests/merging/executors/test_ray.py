"""Merges on a real Ray cluster of this machine: two nodes, three worker processes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import starmerge_models as sm
from starmerge_models.errors import Interrupted, UsageError, WorkersLostError
from starmerge_models.events import Retry
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
from starmerge_models.recipe import make_recipe
from starmerge_models.storage import Place
from starmerge_models.storage.leftovers import leftovers
from starmerge_models.storage.local_folder import LocalFolder
from tests.conftest import MakeAdapter, MakeFinetune
from tests.forks import tree

ray = pytest.importorskip("ray", reason="needs the extra: ray")

_SECONDS = 60.0

_CASES = {
    "model": ("star+ties", {"star.eta": 60}, "model"),
    "adapter": ("average", {}, "adapter"),
    "unified": ("emr", {}, "unified"),
    "survey": ("metagpt", {}, "model"),
    "post-step": ("shares+own_response", {}, "model"),
    "random": ("dare+linear", {"dare.seed": 3}, "model"),
}

_PLUGIN = '''
import logging, os, signal, time
from pathlib import Path
from starmerge_models.deltas import total
from starmerge_models.methods.memory import total_bytes, total_shape
from starmerge_models.methods.method import Merge, method

HERE = Path(__file__).parent

@method("unlucky")
class Unlucky(Merge):
    """Add task vectors; on the way, do to its own process what a file beside it says."""
    def merge(self, deltas, tensor, survey):
        for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
            file = HERE / name
            if file.exists() and file.read_text() in tensor.name:
                if name == "stop" or not (HERE / "always").exists():
                    file.rename(HERE / f"{name}-done")
                (HERE / "pid").write_text(str(os.getpid()))
                os.kill(os.getpid(), number)
        if (HERE / "slow").exists():
            (HERE / f"pid-{os.getpid()}").touch()
            time.sleep(1.5)
        while (HERE / "block").exists() and "layers.1.self_attn.v_proj" in tensor.name:
            time.sleep(0.05)
        return total(deltas)
    def memory(self, tensor): return total_bytes(tensor)
    def result(self, tensor): return total_shape(tensor)
'''


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Start a cluster of two nodes, with one processor and with two; connect to it."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # other processes would come first
    options = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **options})
    cluster.add_node(num_cpus=2, **options)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def workers(address: str) -> Iterator[RayExecutor]:
    """Three workers for all tests, as starting them takes seconds."""
    with RayExecutor(address) as executor:
        yield executor


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's tensors would all be one group."""
    monkeypatch.setattr(schedule, "LEAST", 1)


@contextmanager
def kept(executor: RayExecutor) -> Iterator[RayExecutor]:
    """Lend an executor to a merge, which would end it."""
    yield executor


def plan_of(
    base: Path, models: list[Path], output: Place, method: str, parameters: Any, kind: str
) -> Plan:
    recipe = make_recipe(
        {
            "base": str(base),
            "models": [{"path": str(path), "name": path.name} for path in models],
            "method": method,
            "parameters": parameters,
            "output": {"kind": kind},
        }
    )
    return make_plan(recipe, output)


def merged_twice(
    executor: RayExecutor, tmp_path: Path, plan: Callable[[Path], Plan]
) -> list[dict[str, bytes]]:
    """Merge by threads and by workers into folders of one name, which the card has."""
    local = run(plan(tmp_path / "local" / "out"), Threads(1))
    result = run(plan(tmp_path / "ray" / "out"), kept(executor))
    assert not result.resumed
    return [tree(local.path), tree(result.path)]


def alive(pid: int) -> bool:
    """Tell whether a process is there, and no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


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
    (tmp_path / "own.py").write_text(_PLUGIN)
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    return lambda output: plan_of(tiny_base, models, output, "own.py:Unlucky", {}, "model")


_TENSOR = "layers.1.self_attn.q_proj"


def test_what_a_killed_worker_had_in_hand_is_done_again(
    workers: RayExecutor,
    unlucky: Callable[[Path], Plan],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    local = tree(run(unlucky(tmp_path / "local" / "out"), Threads(1)).path)
    (tmp_path / "kill").write_text(_TENSOR)
    far = tree(run(unlucky(tmp_path / "ray" / "out"), kept(workers)).path)
    assert (tmp_path / "kill-done").exists()
    (retry,) = [record.msg for record in caplog.records if isinstance(record.msg, Retry)]
    assert _TENSOR in retry.what
    assert (retry.attempt, retry.reason[-8:]) == (1, "was lost")
    assert far == local
    assert len(workers.workers) == 3


def test_a_tensor_that_kills_every_worker_is_named_and_the_rest_is_kept(
    workers: RayExecutor, unlucky: Callable[[Path], Plan], tmp_path: Path
) -> None:
    (tmp_path / "kill").write_text(_TENSOR)
    (tmp_path / "always").touch()
    output = tmp_path / "ray" / "out"
    with pytest.raises(WorkersLostError, match=f"3 workers .*{_TENSOR}.*is kept in"):
        run(unlucky(output), kept(workers))
    assert not output.exists()
    (left,) = leftovers(output)
    (tmp_path / "kill").unlink()
    result = run(unlucky(output), Threads(1))
    assert result.resumed > 0
    assert not left.path.exists()
    assert tree(result.path) == tree(run(unlucky(tmp_path / "local" / "out"), Threads(1)).path)


def test_a_worker_that_hangs_holds_up_nothing(
    workers: RayExecutor,
    unlucky: Callable[[Path], Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_executor, "PATIENCE", 1.0)
    monkeypatch.setattr(ray_executor, "_TICK", 0.2)
    local = tree(run(unlucky(tmp_path / "local" / "out"), Threads(1)).path)
    (tmp_path / "stop").write_text(_TENSOR)
    far = tree(run(unlucky(tmp_path / "ray" / "out"), kept(workers)).path)
    assert far == local
    stopped = int((tmp_path / "pid").read_text())
    assert stopped != os.getpid()
    wait_until(lambda: not alive(stopped))


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


def command(plan: Plan, folder: Path, *options: str) -> subprocess.Popen[str]:
    """Begin a merge by the plug-in from the command line."""
    models = [str(entry.path) for entry in plan.recipe.models]
    arguments = ["merge", str(plan.recipe.base), *models, "-m", "own.py:Unlucky"]
    arguments += ["-o", str(plan.path), "--executor", "ray", *options]
    text = (
        # A process that a shell began in the background ignores SIGINT unless told otherwise.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from starmerge_models.merging.executors import schedule; schedule.LEAST = 1; "
        "from starmerge_models.cli import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", text, *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # As in a terminal, where Ctrl-C reaches all processes of the group.
        start_new_session=True,
    )


def test_a_killed_driver_takes_its_workers_along_and_the_merge_goes_on(
    address: str, workers: RayExecutor, unlucky: Callable[[Path], Plan], tmp_path: Path
) -> None:
    output = tmp_path / "ray" / "out"
    plan = unlucky(output)
    journal = output.parent / f".out.partial-{fingerprint(plan)}" / JOURNAL
    (tmp_path / "slow").touch()  # the journal is written once a second
    (tmp_path / "block").touch()
    for worker in list(workers.workers):  # they hold the processors
        workers.stop_worker(worker)
    driver = command(plan, tmp_path, "--address", address)
    wait_until(lambda: journal.exists() and b'"tensor"' in journal.read_bytes())
    driver.kill()
    driver.communicate()
    pids = [int(file.name.partition("-")[2]) for file in tmp_path.glob("pid-*")]
    assert pids
    wait_until(lambda: not any(map(alive, pids)))
    assert not output.exists()
    (tmp_path / "block").unlink()
    (tmp_path / "slow").unlink()
    result = run(unlucky(output), Threads(1))
    assert result.resumed > 0
    assert tree(result.path) == tree(run(unlucky(tmp_path / "local" / "out"), Threads(1)).path)


def test_ctrl_c_leaves_no_process(
    unlucky: Callable[[Path], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARMERGE_TEST", tmp_path.name + str(os.getpid()))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "slow").touch()
    output = tmp_path / "ray" / "out"
    driver = command(unlucky(output), tmp_path, "--threads", "2")
    wait_until(lambda: list(tmp_path.glob("pid-*")))
    os.killpg(driver.pid, signal.SIGINT)
    _, said = driver.communicate(timeout=_SECONDS)
    assert (driver.returncode, said) == (130, "Stopped by Ctrl-C. No partial output was left.\n")
    mark = f"STARMERGE_TEST={os.environ['STARMERGE_TEST']}".encode()

    def others() -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (folder / "environ").read_bytes() and alive(int(folder.name)):
                    found.append(int(folder.name))
        return [pid for pid in found if pid != os.getpid()]

    wait_until(lambda: not others())
    assert leftovers(output) == []
