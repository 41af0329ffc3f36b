"""Executor with worker threads, each with one BLAS thread, within a limit of memory.

BLAS libraries split one product among all cores, and their threads wait for each other in spin
loops: on a machine with other load, a matrix then takes several times as long. Whole tensors are
independent of each other. So each tensor is processed by a single thread, and several tensors are
processed at the same time. Because the arithmetic of a tensor is never split, the results are the
same bytes for any number of threads.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import groupby, islice
from threading import Lock
from types import TracebackType

import torch
from pydantic import ByteSize, TypeAdapter

from starmerge_models.errors import UsageError
from starmerge_models.machine import usable_memory, usable_processors
from starmerge_models.merging.executors.executor import Job, Result

_WINDOW = 4
"""Number of groups per thread in the window: running, waiting, or finished before earlier ones."""

_SMALL = 2**22
"""Bytes, read and held, up to which an item is small, so that Python costs more than arithmetic."""

_GROUP = 64
"""Most small items in a group, few enough for a smooth progress."""


class Threads:
    """An executor with threads of this process, used as a context manager.

    Args:
        threads: Number of tensors processed at the same time; None for :func:`default_threads`.
        memory: Limit in bytes for concurrent tensors, or a text such as "4GB"; None for a quarter
            of :func:`usable_memory`. A tensor that needs more is processed alone.

    Raises:
        UsageError: An argument is not a positive number.
    """

    def __init__(self, threads: int | None = None, memory: int | str | None = None) -> None:
        self.threads = default_threads() if threads is None else threads
        self.memory = usable_memory() // 4 if memory is None else bytes_of(memory)
        if not isinstance(self.threads, int) or self.threads < 1:
            raise UsageError(f"threads is {threads!r}. Give a whole number, 1 or more.")

    spans_machines = False

    def __enter__(self) -> Threads:
        _outside.enter()
        self._pool = ThreadPoolExecutor(self.threads, "worker", prepare_thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._pool.shutdown(cancel_futures=True)
        finally:
            _outside.leave()

    def run(self, job: Job[Result], numbers: Iterable[int]) -> Generator[Result]:
        """Yield the results of items, in the order of the numbers.

        Consecutive small items are processed in groups, one group at a time: several threads would
        contend for Python's global lock and take longer than a single thread.

        Args:
            job: The work.
            numbers: Numbers of the items.
        """
        waiting: deque[Future[list[Result]]] = deque()
        costs: dict[Future[list[Result]], int] = {}
        small: list[Future[list[Result]]] = []

        memory = cache(job.memory)

        def is_small(number: int) -> bool:
            nbytes = job.nbytes(number)
            return nbytes is not None and max(memory(number), nbytes) <= _SMALL

        with job.open() as work:
            try:
                for group in _groups(numbers, is_small):
                    cost = max(map(memory, group))
                    while costs and sum(costs.values()) + cost > self.memory:
                        for done in wait(costs, return_when=FIRST_COMPLETED).done:
                            del costs[done]
                    for number in group:
                        job.announce(number)
                    if is_small(group[0]):
                        wait(small)
                    future = self._pool.submit(_work_on, work, group)
                    if is_small(group[0]):
                        small = [future]
                    waiting.append(future)
                    costs[future] = cost
                    while waiting and (waiting[0].done() or len(waiting) >= self.threads * _WINDOW):
                        yield from _next_result(waiting)
                        costs.pop(waiting.popleft(), None)
                while waiting:
                    yield from _next_result(waiting)
                    waiting.popleft()
            finally:
                for future in waiting:
                    future.cancel()
                wait(waiting)


def _groups(numbers: Iterable[int], is_small: Callable[[int], bool]) -> Iterator[tuple[int, ...]]:
    """Yield groups of consecutive small items; each large item is its own group."""
    for small, run in groupby(numbers, is_small):
        while group := tuple(islice(run, _GROUP if small else 1)):
            yield group


def _work_on(work: Callable[[int], Result], group: Sequence[int]) -> list[Result]:
    return [work(number) for number in group]


def _next_result(waiting: Sequence[Future[Result]]) -> Result:
    """Wait for the first future and return its result; raise earlier if another future fails."""
    while not waiting[0].done():
        for future in waiting:
            if future.done():
                future.result()
        wait([future for future in waiting if not future.done()], return_when=FIRST_COMPLETED)
    return waiting[0].result()


def prepare_thread() -> None:
    """Limit torch to one thread in the current thread, and disable gradients."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


class _TorchThreads:
    """Torch's number of threads outside of workers.

    The setting is per thread, but new threads inherit the value that was set last. So the value of
    the workers must be reset when the last of several concurrent pools is closed.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._pools = 0
        self._threads = 0

    def enter(self) -> None:
        with self._lock:
            if not self._pools:
                self._threads = torch.get_num_threads()
            self._pools += 1

    def leave(self) -> None:
        with self._lock:
            self._pools -= 1
            if not self._pools:
                torch.set_num_threads(self._threads)

    @property
    def threads(self) -> int:
        with self._lock:
            return self._threads if self._pools else torch.get_num_threads()


_outside = _TorchThreads()


def bytes_of(memory: int | str) -> int:
    """Parse a number of bytes, or a text such as "4GB".

    Raises:
        UsageError: It is not a positive number.
    """
    count = 0
    if isinstance(memory, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*[kmgtp]?i?b?\s*", memory, re.I):
        count = TypeAdapter(ByteSize).validate_python(memory)
    elif isinstance(memory, int) and not isinstance(memory, bool):
        count = memory
    if count < 1:
        raise UsageError(f"memory is {memory!r}. Give bytes, or a number with a unit: 4GB, 512MiB.")
    return count


def default_threads() -> int:
    """Return torch's default number of threads, limited to the processors that the process may use.

    It is OMP_NUM_THREADS, or the number of processors; in a container with a quota, the number that
    the quota allows.
    """
    return min(_outside.threads, max(1, int(usable_processors())))
