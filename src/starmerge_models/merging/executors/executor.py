"""The seam between the work of a merge and who carries it out.

Work is a job and numbers. What is done for a number depends on the job and the number alone,
changes nothing but the number's own part of the output, and is told by a result that can be
pickled, as the job can. So it may be done anywhere, in any order, and again if it was lost. Methods
look at tensors by functions that are defined in functions: cloudpickle, which Ray uses, pickles
them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Job(Protocol[Result_co]):
    """Work that is done for numbers."""

    def open(self) -> AbstractContextManager[Callable[[int], Result_co]]:
        """Yield a function that does the work for a number; several threads may call it.

        A process opens a job once, works on any numbers, and closes what it wrote at the end.
        """

    def memory(self, number: int) -> int:
        """Estimate the bytes in memory while a number is worked on."""

    def nbytes(self, number: int) -> int | None:
        """Return how many bytes are read for a number; None if that is not known."""

    def announce(self, number: int) -> None:
        """Begin to read ahead for a number that will soon be worked on."""

    def check(self) -> None:
        """Make sure, on another machine, that what the job reads and writes is reached from there.

        Raises:
            StarmergeError: Something is not.
        """

    def label(self, number: int) -> str:
        """Return what errors call the work for a number, such as "the tensor lm_head.weight"."""


class Executor(Protocol):
    """Carries out jobs."""

    @property
    def threads(self) -> int | None:
        """How many numbers are worked on at once; None: as many as a cluster has processors."""

    @property
    def memory(self) -> int | None:
        """Bytes that what is worked on at once on a machine may take; None: a quarter of its."""

    @property
    def spans_machines(self) -> bool:
        """Whether several machines may fill one output; False: this one alone."""

    def run(self, job: Job[Result], numbers: Iterable[int]) -> Generator[Result]:
        """Yield the results of some numbers, in the order of the numbers.

        If the work for one raises, or the iterator is closed early, no other begins, and what has
        begun is waited for.

        Args:
            job: The work.
            numbers: What it is done for.
        """


@dataclass(frozen=True)
class FunctionJob(Generic[Result]):
    """A function as a job: for threads of this process, unless it can be pickled.

    Args:
        function: The work.
        cost: Estimates the bytes in memory while a number is worked on.
    """

    function: Callable[[int], Result]
    cost: Callable[[int], int]

    @contextmanager
    def open(self) -> Iterator[Callable[[int], Result]]:
        """Yield the function."""
        yield self.function

    def memory(self, number: int) -> int:
        """Estimate the bytes in memory while a number is worked on."""
        return self.cost(number)

    def nbytes(self, number: int) -> None:
        """Return None: it is not known what is read."""

    def announce(self, number: int) -> None:
        """Do nothing: what is read is not known."""

    def check(self) -> None:
        """Do nothing: what is read is not known."""

    def label(self, number: int) -> str:
        """Return the number."""
        return f"number {number}"
