"""Several tensors at once: the order, the bounds, what happens when one fails."""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starmerge_models.errors import UsageError
from starmerge_models.machine import usable_memory
from starmerge_models.merging.executors.executor import FunctionJob
from starmerge_models.merging.executors.threads import Threads, default_threads


@dataclass(frozen=True)
class _Job(FunctionJob[Any]):
    """A function that says what it reads."""

    size: Callable[[int], int | None]
    announced: Callable[[int], None]

    def nbytes(self, number: int) -> int | None:  # type: ignore[override]
        return self.size(number)

    def announce(self, number: int) -> None:
        self.announced(number)


def _job(
    work: Callable[[int], Any],
    memory: Callable[[int], int] = lambda n: 1,
    announce: Callable[[int], None] = lambda n: None,
    nbytes: Callable[[int], int | None] = lambda n: None,
) -> _Job:
    return _Job(work, memory, nbytes, announce)


@settings(max_examples=40)
@given(
    costs=st.lists(st.integers(0, 10), max_size=30),
    threads=st.integers(1, 4),
    memory=st.integers(1, 20),
)
def test_results_come_in_order_and_the_memory_is_not_exceeded(costs, threads, memory):
    working: set[int] = set()
    lock = threading.Lock()
    seen = []

    def work(number):
        with lock:
            working.add(number)
            together = sum(costs[n] for n in working)
            seen.append((len(working), together, len([n for n in working if costs[n]])))
        time.sleep(0.0005 * (number % 3))
        with lock:
            working.remove(number)
        return number

    with Threads(threads, memory) as workers:
        done = workers.run(_job(work, memory=costs.__getitem__), range(len(costs)))
        assert list(done) == list(range(len(costs)))
    assert all(at_once <= threads for at_once, _, _ in seen)
    # Above the bound is only one that needs more than all of it.
    assert all(together <= memory or others == 1 for _, together, others in seen)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([1, 10, 2**30]), max_size=200),
    threads=st.integers(1, 4),
    is_closed_early=st.booleans(),
)
def test_small_items_are_worked_on_one_at_a_time_and_large_ones_beside_them(
    sizes, threads, is_closed_early
):
    working: set[int] = set()
    lock = threading.Lock()
    seen = []

    def work(number):
        with lock:
            working.add(number)
            seen.append({n for n in working if sizes[n] < 2**30})
        time.sleep(0.0001)
        with lock:
            working.remove(number)
        return number

    with Threads(threads) as workers:
        done = workers.run(
            _job(work, memory=lambda n: 0, nbytes=sizes.__getitem__), range(len(sizes))
        )
        if is_closed_early and sizes:
            assert next(done) == 0
            done.close()
            assert not working
        else:
            assert list(done) == list(range(len(sizes)))
    assert all(len(small) <= 1 for small in seen)


def test_large_items_do_not_wait_for_each_other_where_small_ones_lie_between():
    met = threading.Barrier(2, timeout=20)

    def work(size):
        if size > 1:
            met.wait()
        return size

    sizes = [2**30, 1, 1, 2**30, 1] * 3 + [2**30, 2**30]
    with Threads(2) as workers:
        done = workers.run(_job(work, memory=lambda n: 0, nbytes=lambda size: size), sizes)
        assert list(done) == sizes


def test_items_are_announced_before_they_are_worked_on():
    events = []
    with Threads(2) as workers:
        done = workers.run(
            _job(
                lambda n: events.append(("work", n)),
                announce=lambda n: events.append(("announce", n)),
            ),
            range(6),
        )
        list(done)
    for n in range(6):
        assert events.index(("announce", n)) < events.index(("work", n))
    assert events.index(("announce", 3)) < events.index(("work", 5)), "some are told ahead"


def test_after_a_failure_nothing_begins_and_what_runs_is_waited_for():
    running, begun = threading.Event(), []
    finished = []

    def work(n):
        begun.append(n)
        if n == 0:
            running.wait(5)
            raise ZeroDivisionError
        running.set()
        time.sleep(0.05)
        finished.append(n)

    with Threads(2) as workers:
        done = workers.run(_job(work), range(1000))
        with pytest.raises(ZeroDivisionError):
            list(done)
        assert sorted(begun) == sorted([0, *finished])
        assert len(begun) < 20
        # The pool goes on for the next walk.
        again = workers.run(_job(abs), [-1, -2])
        assert list(again) == [1, 2]


def test_closing_early_waits_for_what_runs():
    finished = []

    def work(n):
        time.sleep(0.02)
        finished.append(n)
        return n

    with Threads(2) as workers:
        done = workers.run(_job(work), range(100))
        assert next(done) == 0
        done.close()
        count = len(finished)
        time.sleep(0.1)
        assert len(finished) == count < 20


def test_each_worker_has_one_thread_of_torch_and_the_caller_keeps_its_own():
    torch.set_num_threads(2)
    try:
        with Threads(2) as workers:
            found = workers.run(_job(lambda _: torch.get_num_threads()), range(8))
            assert set(found) == {1}
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("size", [37, 256, 700])
def test_a_product_has_the_same_bytes_in_every_worker(size):
    generator = np.random.default_rng(size)
    X = torch.tensor(generator.standard_normal((size, size)), dtype=torch.float32)

    def product(_):
        return (X @ X.T).numpy().tobytes(), torch.linalg.svdvals(X).numpy().tobytes()

    found = set()
    for threads in (1, 2, 3):
        with Threads(threads) as workers:
            found |= set(workers.run(_job(product), range(6)))
    assert len(found) == 1


def test_the_defaults_fit_the_machine():
    assert 1 <= default_threads() <= torch.get_num_threads()
    lines = Path("/proc/meminfo").read_text().splitlines()
    physical = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert 0 < usable_memory() <= 1.01 * physical
    assert Threads().memory == usable_memory() // 4


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(1000, 1000), ("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("512MiB", 2**29)],
)
def test_memory_may_have_a_unit(memory, expected):
    assert Threads(1, memory).memory == expected


@pytest.mark.parametrize(
    "wrong",
    [
        "much",
        "-1GB",
        0,
        -5,
        "",
        "1,5GB",
        "50%",
        "1.000.000",
        "4GB!",
        "4 GB of it",
        True,
        2.5,
        "0GB",
    ],
)
def test_what_is_no_memory_is_refused(wrong):
    with pytest.raises(UsageError, match="with a unit: 4GB"):
        Threads(1, wrong)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "2"])
def test_what_is_no_number_of_threads_is_refused(wrong):
    with pytest.raises(UsageError, match="Give a whole number, 1 or more"):
        Threads(wrong)


def test_pools_at_the_same_time_leave_the_number_of_threads_as_it_was():
    torch.set_num_threads(3)
    try:
        with Threads() as first:
            assert first.threads == default_threads()
            with Threads() as second:
                assert second.threads == first.threads
                list(second.run(_job(abs, memory=abs), [1]))
            list(first.run(_job(abs, memory=abs), [1]))
            assert default_threads() == first.threads
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(1)


def test_an_interrupted_wait_leaves_no_work_behind():
    """What Ctrl-C does: an exception out of the wait for the first result."""
    ended = []

    def work(n):
        time.sleep(0.3)
        ended.append(n)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Threads(2) as workers:
            done = workers.run(_job(work), range(2))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                next(done)
            assert sorted(ended) == [0, 1]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_failure_is_told_before_an_earlier_item_is_done():
    release = threading.Event()

    def work(n):
        if n:
            raise ZeroDivisionError
        release.wait(10)

    with Threads(2) as workers:
        done = workers.run(_job(work), range(2))
        threading.Timer(0.5, release.set).start()
        with pytest.raises(ZeroDivisionError):
            next(done)


def test_workers_build_no_graphs_for_gradients():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with Threads(2) as workers:
        found = workers.run(_job(lambda n: (weight * n).requires_grad), range(3))
        assert not any(found)
    assert torch.is_grad_enabled()
