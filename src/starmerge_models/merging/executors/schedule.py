"""Scheduling of work on many workers: the order of groups, and repetitions after losses.

A schedule has no clock and no knowledge of machines: the caller reports which groups were started,
finished or lost. So the same code runs on a cluster
(:mod:`starmerge_models.merging.executors.ray`) and in a simulation of a cluster.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic

from starmerge_models.errors import WorkersLostError
from starmerge_models.merging.executors.executor import Job, Result

GROUPS = 16
"""Number of groups per slot: many, so that a slow worker gets fewer groups, and a lost worker loses
little work."""

WINDOW = 4
"""Number of groups per slot in the window: running, waiting, or finished before earlier groups."""

MOST = 64
"""Most items in a group, few enough for a smooth progress."""

LEAST = 2**22
"""Bytes of a group below which assigning it costs more than processing it."""

DEATHS = 3
"""Number of workers lost at the same item after which the job is aborted."""


@dataclass(frozen=True, eq=False)
class Group:
    """Consecutive items that one worker processes one after the other."""

    position: int
    """Index of the first item among all items."""
    numbers: tuple[int, ...]
    cost: float
    """Estimated cost, which grows with the run time."""
    memory: int
    """Upper bound of the memory in bytes."""


@dataclass
class _Running:
    """A running group."""

    since: float
    copies: int = 1
    """Number of workers that process it."""


@dataclass
class Schedule(Generic[Result]):
    """The items of a job in groups, with the state of each group.

    Groups have about the same cost, which is the bytes that are read plus the memory of the work:
    methods that compute more also hold more. Of the groups in the window the most expensive is
    started first, so that no large tensor remains at the end, when the other workers are idle.
    Results are returned in order, and a bounded number of them is buffered.

    Args:
        job: The work.
        numbers: Numbers of the items, without duplicates.
        places: Number of groups that can be processed at the same time.
    """

    job: Job[Result]
    numbers: Sequence[int]
    places: int
    _found: dict[int, Result] = field(default_factory=dict, init=False)
    _deaths: Counter[int] = field(default_factory=Counter, init=False)
    _open: list[Group] = field(default_factory=list, init=False)
    """Groups of the window that no worker processes, by position."""
    _running: dict[Group, _Running] = field(default_factory=dict, init=False)
    _spent: float = field(default=0.0, init=False)
    _cost: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._waiting = deque(_groups(self.job, self.numbers, self.places))
        self._window: deque[Group] = deque()
        """Groups whose results have not all been returned, by position."""
        self._left = deque(self.numbers)

    @property
    def is_done(self) -> bool:
        """Whether all results have been returned."""
        return not self._left

    def results(self) -> Iterator[Result]:
        """Yield the results that are next in order."""
        while self._left and self._left[0] in self._found:
            number = self._left.popleft()
            yield self._found.pop(number)
            while self._window and not self._is_left(self._window[0]):
                self._window.popleft()

    def begin(self, now: float, fits: Callable[[int], bool]) -> Group | None:
        """Choose a group for a worker to start; None if there is none now.

        Args:
            now: Time in seconds, of any clock.
            fits: Returns whether the worker's machine has a number of bytes free.
        """
        while self._waiting and len(self._window) < WINDOW * self.places:
            group = self._waiting.popleft()
            self._window.append(group)
            self._open.append(group)
        fitting = [group for group in self._open if fits(group.memory)]
        if not fitting:
            return None
        # The window only moves on after its first group, so while more groups wait behind the
        # window, the first group is started before half of the window is.
        is_late = self._waiting and len(self._open) <= WINDOW * self.places // 2
        first = fitting[0]
        chosen = first if is_late else max(fitting, key=lambda group: group.cost)
        self._open.remove(chosen)
        self._running[chosen] = _Running(now)
        return chosen

    def begin_copy(
        self,
        now: float,
        patience: float,
        fits: Callable[[int], bool],
        own: Sequence[Group] = (),
    ) -> Group | None:
        """Choose a running group for an idle worker to process a second time.

        It is the first group that has taken much longer than others: its worker may hang, and the
        results of all later groups wait for it.

        Args:
            now: As for :meth:`begin`.
            patience: Seconds during which no group counts as late.
            fits: As for :meth:`begin`.
            own: The groups that this worker is processing itself.
        """
        if self._open:
            return None
        for group, begun in self._running.items():
            is_late = self.is_late(group, now, patience)
            if is_late and begun.copies == 1 and group not in own and fits(group.memory):
                begun.copies += 1
                return group
        return None

    def is_late(self, group: Group, now: float, patience: float) -> bool:
        """Return whether a group has taken so long that its worker may hang.

        Args:
            group: A running group.
            now: As for :meth:`begin`.
            patience: Seconds during which no group counts as late.
        """
        begun = self._running.get(group)
        if begun is None:  # another worker has done it
            return True
        pace = 3 * self._spent / self._cost if self._cost else 0.0
        return now - begun.since > max(patience, pace * group.cost)

    def done(self, group: Group, results: Sequence[Result], now: float) -> None:
        """Record the results of a group; those of a second worker are identical."""
        begun = self._running.pop(group, None)
        if begun is None:
            return
        self._spent, self._cost = self._spent + now - begun.since, self._cost + group.cost
        self._found.update(zip(group.numbers, results, strict=True))

    def lost(self, group: Group, reason: str) -> int:
        """Record that a worker was lost while it processed a group, and reschedule the group.

        The items of the group are then started one by one, to find an item that kills workers.

        Args:
            group: The group of the lost worker.
            reason: The reason of the loss, a sentence.

        Returns:
            The largest number of workers that were lost at an item of the group; 0 if another
            worker has processed or is processing the group, so that nothing is repeated.

        Raises:
            WorkersLostError: Too many workers were lost at an item of the group.
        """
        begun = self._running.get(group)
        if begun is None:  # done by another
            return 0
        self._deaths.update(group.numbers)
        fatal = [number for number in group.numbers if self._deaths[number] >= DEATHS]
        if fatal:
            said = ", ".join(map(self.job.label, fatal))
            raise WorkersLostError(
                f"{DEATHS} workers were lost while they worked on {said}, the last one so: "
                f"{reason} If memory was short, give machines with more, or fewer --threads."
            )
        begun.copies -= 1
        if begun.copies:  # another worker processes it too
            return 0
        del self._running[group]
        job = self.job
        self._open += [
            Group(group.position + i, (number,), _cost(job, number), job.memory(number))
            for i, number in enumerate(group.numbers)
        ]
        self._open.sort(key=lambda group: group.position)
        return max(self._deaths[number] for number in group.numbers)

    def _is_left(self, group: Group) -> bool:
        """Return whether a result of a group in the window has not been returned yet."""
        done = len(self.numbers) - len(self._left)
        return group.position + len(group.numbers) > done


def _cost(job: Job[Result], number: int) -> float:
    """Return the cost of an item: the bytes that are read and held."""
    return job.memory(number) + (job.nbytes(number) or 0)


def _groups(job: Job[Result], numbers: Sequence[int], places: int) -> Iterator[Group]:
    """Combine consecutive items until they reach the cost of a group."""
    costs: Mapping[int, float] = {number: _cost(job, number) for number in numbers}
    share = max(LEAST, sum(costs.values()) / (GROUPS * places))
    # Items of unknown cost may take long, so each gets its own group.
    most = MOST if any(costs.values()) else 1
    group: list[int] = []
    for position, number in enumerate(numbers):
        cost = sum(map(costs.__getitem__, group))
        if group and (cost + costs[number] > share or len(group) == most):
            yield _group(job, costs, position - len(group), group)
            group = []
        group.append(number)
    if group:
        yield _group(job, costs, len(numbers) - len(group), group)


def _group(
    job: Job[Result], costs: Mapping[int, float], position: int, numbers: Sequence[int]
) -> Group:
    cost = sum(costs[number] for number in numbers)
    return Group(position, tuple(numbers), cost, max(map(job.memory, numbers)))
