"""The interface between the work of a merge and its executors.

Work consists of a job and item numbers. The work on an item depends only on the job and the number,
writes only to the item's part of the output, and returns a result. Jobs and results can be pickled.
So the items can be processed on any machine, in any order, and repeated after a loss. Surveys of
methods are closures, which cloudpickle, the pickler of Ray, supports.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Job(Protocol[Result_co]):
    """Work on numbered items."""

    def open(self) -> AbstractContextManager[Callable[[int], Result_co]]:
        """Yield a thread-safe function that processes the item of a number.

        A process opens a job once, processes any number of items, and closes its files at the end.
        """

    def memory(self, number: int) -> int:
        """Estimate the memory that an item takes, in bytes."""

    def nbytes(self, number: int) -> int | None:
        """Return the number of bytes that are read for an item; None if not known."""

    def announce(self, number: int) -> None:
        """Start to prefetch the input of an item that will be processed soon."""

    def check(self) -> None:
        """Check, on another machine, that the job's inputs and outputs are reachable.

        Raises:
            StarmergeError: Some file is not reachable.
        """

    def label(self, number: int) -> str:
        """Return the name of an item for error messages, such as "the tensor lm_head.weight"."""


class Executor(Protocol):
    """Runs jobs."""

    @property
    def threads(self) -> int | None:
        """Number of items processed at the same time; None for all processors of a cluster."""

    @property
    def memory(self) -> int | None:
        """Limit in bytes for concurrent items on a machine; None for a quarter of its memory."""

    @property
    def spans_machines(self) -> bool:
        """Whether several machines may write to the output."""

    def run(self, job: Job[Result], numbers: Iterable[int]) -> Generator[Result]:
        """Yield the results of items, in the order of the numbers.

        If an item raises an error, or the iterator is closed early, no further item is started, and
        the iterator waits for running ones.

        Args:
            job: The work.
            numbers: Numbers of the items.
        """


@dataclass(frozen=True)
class FunctionJob(Generic[Result]):
    """A job that calls a function; executors other than threads require it to be picklable.

    Args:
        function: Function of an item's number.
        cost: Function that estimates the memory of an item, in bytes.
    """

    function: Callable[[int], Result]
    cost: Callable[[int], int]

    @contextmanager
    def open(self) -> Iterator[Callable[[int], Result]]:
        """Yield the function."""
        yield self.function

    def memory(self, number: int) -> int:
        """Estimate the memory that an item takes, in bytes."""
        return self.cost(number)

    def nbytes(self, number: int) -> None:
        """Return None: the input of the function is not known."""

    def announce(self, number: int) -> None:
        """Do nothing: what is read is not known."""

    def check(self) -> None:
        """Do nothing: what is read is not known."""

    def label(self, number: int) -> str:
        """Return the number."""
        return f"number {number}"
