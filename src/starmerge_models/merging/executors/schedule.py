"""Which work is begun next, where, and again: the plan of an executor with many workers.

A schedule knows no clock and no machine: its caller tells what was begun, done or lost. So the same
schedule runs on a cluster (:mod:`starmerge_models.merging.executors.ray`) and in a simulation of
one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic

from starmerge_models.errors import WorkersLostError
from starmerge_models.merging.executors.executor import Job, Result

GROUPS = 16
"""Groups of numbers for each place where one is worked on: many, so that a slow worker gets fewer
of them, and that little is lost with one."""

WINDOW = 4
"""Groups for each place that are in work, wait, or are done and wait for their turn."""

MOST = 64
"""Most numbers in a group: few enough that the progress shows."""

LEAST = 2**22
"""Bytes of a group below which handing it out costs more than working on it."""

DEATHS = 3
"""Workers that a number may cost before it is given up."""


@dataclass(frozen=True, eq=False)
class Group:
    """Neighbouring numbers that one worker does one after the other."""

    position: int
    """Of the first number among all."""
    numbers: tuple[int, ...]
    cost: float
    """Grows with the time that it takes."""
    memory: int
    """Bytes that the work takes at most."""


@dataclass
class _Begun:
    """A group in work."""

    since: float
    copies: int = 1
    """Workers that have it."""


@dataclass
class Schedule(Generic[Result]):
    """The numbers of a job, put into groups, and the state of each.

    Groups have about the same cost, which is the bytes that are read and the memory that the work
    takes: methods that compute much also hold much. Of the next groups the most expensive is begun
    first, so that no large tensor is left for the end, when the other workers have nothing to do.
    Results come in the order of the numbers, and a bounded number of them waits for its turn.

    Args:
        job: The work.
        numbers: What it is done for; no number stands there twice.
        places: How many groups can be worked on at once.
    """

    job: Job[Result]
    numbers: Sequence[int]
    places: int
    _found: dict[int, Result] = field(default_factory=dict, init=False)
    _deaths: Counter[int] = field(default_factory=Counter, init=False)
    _open: list[Group] = field(default_factory=list, init=False)
    """Those of the window that nobody works on, by position."""
    _begun: dict[Group, _Begun] = field(default_factory=dict, init=False)
    _spent: float = field(default=0.0, init=False)
    _cost: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._waiting = deque(_groups(self.job, self.numbers, self.places))
        self._window: deque[Group] = deque()
        """Groups whose results have not all been handed on, by position."""
        self._left = deque(self.numbers)

    @property
    def is_done(self) -> bool:
        """Whether all results have been handed on."""
        return not self._left

    def results(self) -> Iterator[Result]:
        """Hand on the results whose turn it is."""
        while self._left and self._left[0] in self._found:
            number = self._left.popleft()
            yield self._found.pop(number)
            while self._window and not self._is_left(self._window[0]):
                self._window.popleft()

    def begin(self, now: float, fits: Callable[[int], bool]) -> Group | None:
        """Choose what a worker begins; None if there is nothing for it now.

        Args:
            now: Seconds, of any clock.
            fits: Tells whether the worker's machine has room for the bytes of some work.
        """
        while self._waiting and len(self._window) < WINDOW * self.places:
            group = self._waiting.popleft()
            self._window.append(group)
            self._open.append(group)
        fitting = [group for group in self._open if fits(group.memory)]
        if not fitting:
            return None
        # The first group holds up the window, so while more groups wait for it to move on, the
        # first is begun before half of the window is.
        is_late = self._waiting and len(self._open) <= WINDOW * self.places // 2
        first = fitting[0]
        chosen = first if is_late else max(fitting, key=lambda group: group.cost)
        self._open.remove(chosen)
        self._begun[chosen] = _Begun(now)
        return chosen

    def again(
        self,
        now: float,
        patience: float,
        fits: Callable[[int], bool],
        own: Sequence[Group] = (),
    ) -> Group | None:
        """Choose what a worker with nothing else to do begins a second time.

        That is the first group whose worker has needed much longer than others need for their
        groups: it may hang, and the results of all later groups wait for it.

        Args:
            now: As for :meth:`begin`.
            patience: Seconds that no group is too long.
            fits: As for :meth:`begin`.
            own: What the worker has in work itself.
        """
        if self._open:
            return None
        for group, begun in self._begun.items():
            is_late = self.is_late(group, now, patience)
            if is_late and begun.copies == 1 and group not in own and fits(group.memory):
                begun.copies += 1
                return group
        return None

    def is_late(self, group: Group, now: float, patience: float) -> bool:
        """Tell whether a group takes so long that its worker may hang.

        Args:
            group: What is in work.
            now: As for :meth:`begin`.
            patience: Seconds that no group is too long.
        """
        begun = self._begun.get(group)
        if begun is None:  # another worker has done it
            return True
        pace = 3 * self._spent / self._cost if self._cost else 0.0
        return now - begun.since > max(patience, pace * group.cost)

    def done(self, group: Group, results: Sequence[Result], now: float) -> None:
        """Note the results of a group; those of a second worker are the same."""
        begun = self._begun.pop(group, None)
        if begun is None:
            return
        self._spent, self._cost = self._spent + now - begun.since, self._cost + group.cost
        self._found.update(zip(group.numbers, results, strict=True))

    def lost(self, group: Group, reason: str) -> int:
        """Note that a worker was lost while it worked on a group, which is then done again.

        Its numbers are begun one by one, so that one which kills workers is found.

        Args:
            group: What it worked on.
            reason: What is known of the loss, a sentence.

        Returns:
            How many workers a number of the group has cost so far, at most; 0 if another worker
            has done the group or is at it, so that nothing is begun again.

        Raises:
            WorkersLostError: A number of the group has cost too many workers.
        """
        begun = self._begun.get(group)
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
        if begun.copies:  # another worker has it, too
            return 0
        del self._begun[group]
        job = self.job
        self._open += [
            Group(group.position + i, (number,), _cost(job, number), job.memory(number))
            for i, number in enumerate(group.numbers)
        ]
        self._open.sort(key=lambda group: group.position)
        return max(self._deaths[number] for number in group.numbers)

    def _is_left(self, group: Group) -> bool:
        """Tell whether some result of a group in the window has not been handed on."""
        done = len(self.numbers) - len(self._left)
        return group.position + len(group.numbers) > done


def _cost(job: Job[Result], number: int) -> float:
    """Return the bytes that are read and held, which the time of the work grows with."""
    return job.memory(number) + (job.nbytes(number) or 0)


def _groups(job: Job[Result], numbers: Sequence[int], places: int) -> Iterator[Group]:
    """Put neighbours together until they cost what a group should."""
    costs: Mapping[int, float] = {number: _cost(job, number) for number in numbers}
    share = max(LEAST, sum(costs.values()) / (GROUPS * places))
    # Work of which nothing is known may take long.
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
