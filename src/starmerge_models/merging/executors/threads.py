"""Several tensors at once: worker threads with one BLAS thread each, within a bound of memory.

BLAS libraries share one product among all cores, and their threads wait for each other in loops: on
a machine with other work a matrix then takes a multiple of its time. Whole tensors need not wait
for each other. So each is worked on by a single thread, and as many tensors as there are threads
are worked on at once. As the arithmetic of a tensor is never shared, the results are the same
bytes whatever the number of threads.
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
"""Groups of items per thread that are in work, wait, or are done and wait for their turn."""

_SMALL = 2**22
"""Bytes of a small item, to read and to work with: it costs more Python than arithmetic."""

_GROUP = 64
"""Most small items in a group: few enough that the progress shows."""


class Threads:
    """An executor: threads of this process. To be used as a context manager.

    Args:
        threads: How many tensors are worked on at once; None for :func:`default_threads`.
        memory: Bytes that the tensors in work may take together, or a text such as "4GB"; None for
            a quarter of :func:`usable_memory`. A tensor that needs more is worked on alone.

    Raises:
        UsageError: One of them is not a positive number.
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
        """Yield the results of some numbers, in the order of the numbers.

        Small neighbours are worked on in groups, one group at a time: several threads would wait
        for Python's lock, and lose more by handing it around than one of them needs for all.

        Args:
            job: The work.
            numbers: What it is done for.
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
                        yield from _head(waiting)
                        costs.pop(waiting.popleft(), None)
                while waiting:
                    yield from _head(waiting)
                    waiting.popleft()
            finally:
                for future in waiting:
                    future.cancel()
                wait(waiting)


def _groups(numbers: Iterable[int], is_small: Callable[[int], bool]) -> Iterator[tuple[int, ...]]:
    """Put small neighbours together; others stay alone."""
    for small, run in groupby(numbers, is_small):
        while group := tuple(islice(run, _GROUP if small else 1)):
            yield group


def _work_on(work: Callable[[int], Result], group: Sequence[int]) -> list[Result]:
    return [work(number) for number in group]


def _head(waiting: Sequence[Future[Result]]) -> Result:
    """Wait for the first, or for a failure of another, and return its result."""
    while not waiting[0].done():
        for future in waiting:
            if future.done():
                future.result()
        wait([future for future in waiting if not future.done()], return_when=FIRST_COMPLETED)
    return waiting[0].result()


def prepare_thread() -> None:
    """Prepare a thread that works: no threads of its own below it, and no graphs for gradients."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


class _Outside:
    """How many threads torch uses outside of workers.

    Each thread has a number of its own, but those to come have the last that was set, so the
    workers' must be taken back: when the last pool is left, of several at the same time.
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


_outside = _Outside()


def bytes_of(memory: int | str) -> int:
    """Return the bytes that a number, or a text such as "4GB", stands for.

    Raises:
        UsageError: It is no positive number.
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
    """Return how many threads torch would use, but not more than the process may have processors.

    That is what OMP_NUM_THREADS says, or the number of processors; in a container with a quota, as
    many as the quota pays for.
    """
    return min(_outside.threads, max(1, int(usable_processors())))
