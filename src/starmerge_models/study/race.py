"""A race of candidates over more and more rows: what is clearly behind stops early.

The race knows neither models nor tasks: it is told scores, and says who goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from starmerge_models.evaluation.scoring.comparison import (
    LEVEL,
    Difference,
    Interval,
    difference,
    is_clearly_worse,
    mean_ratio,
    normalised_average,
)
from starmerge_models.evaluation.scoring.metrics import Score

START = 8
"""Rows of a task in the first round; each further round doubles them."""

EVEN = 0.5
"""A p-value from here on: a difference that equally good candidates show more often than not."""

Scores = Mapping[str, Score]
"""By task."""

Ask = Callable[[Sequence[str], int], Mapping[str, Scores]]
"""From candidates and the number of a round, the scores of each on all rows up to that round."""


def sizes(rows: int) -> list[int]:
    """Return how many rows of a task have been asked at the end of each round: 8, 16, 32 … rows."""
    found = []
    size = START
    while size < rows:
        found.append(size)
        size *= 2
    return [*found, rows]


@dataclass(frozen=True)
class Standing:
    """How far a candidate came."""

    name: str
    rounds: int
    """How many rounds it was asked in."""
    rows: int
    """That it was asked, over all tasks."""
    averages: tuple[Interval | None, ...]
    """After each of its rounds, its normalised average on all rows up to it; None where that is
    undefined."""
    gap: Difference | None
    """Its average less that of the race's best on the same rows, paired; None for the best itself,
    and where an average is undefined."""
    stopped: Literal["behind", "budget"] | None
    """Why its last round was its last: it was clearly behind, or there were too few rows left in
    the budget. None if neither happened up to the end of the race."""

    @property
    def average(self) -> Interval | None:
        """Its normalised average on all rows that it was asked."""
        return self.averages[-1]


@dataclass(frozen=True)
class Outcome:
    """How a race ended."""

    standings: tuple[Standing, ...]
    """Those that came farthest first, of these the best first."""
    best: str
    """The candidate with the highest average in the last round."""
    ties: tuple[str, ...]
    """The best, and those that nothing stopped: they show no clear difference from it. In the order
    in which the candidates were given."""
    chosen: str
    """The first given of those whose lag behind the best is as likely as not chance (p ≥ 0.5): a
    candidate that is merely not clearly behind may well be worse."""


def race(
    names: Sequence[str],
    ask: Ask,
    ceilings: Sequence[Scores],
    costs: Sequence[int],
    budget: int | None = None,
) -> Outcome:
    """Let candidates answer more and more rows until the last round, or until one is left.

    After each round, a candidate stops whose normalised average is clearly below that of the best
    of this round. Clearly: the paired p-value is at most 0.05/m, where m = (candidates − 1) ·
    rounds is the number of comparisons in which the truly best candidate could be the loser
    (Bonferroni). So with a probability of 95 % at least, it is never stopped for being behind.

    Without a budget nothing else stops a candidate: some that are equally good all come to the last
    round, and the race costs what asking them everything costs. With one, the rows that are left
    are shared out equally among the rounds that are left, as in successive halving
    (arXiv 1502.07943), and as many candidates go on as a round's share pays for, the best ones; or
    more, if the budget pays for all their rounds.

    The order of the names decides nothing but which of the ties is first.

    Args:
        names: The candidates.
        ask: Asks some of them the rows of a round.
        ceilings: For each round, the fine-tunes' scores on all rows up to it.
        costs: For each round, how many rows it asks of a candidate.
        budget: How many rows may be asked in all; at least those of all candidates' first round.
    """
    level = LEVEL / max(1, (len(names) - 1) * len(costs))
    history: dict[str, list[Scores]] = {name: [] for name in names}
    stopped: dict[str, Literal["behind", "budget"]] = {}
    alive = list(names)
    best, spent = names[0], 0
    for number, cost in enumerate(costs):
        for name, scores in ask(alive, number).items():
            history[name].append(scores)
        spent += cost * len(alive)
        ceiling = ceilings[number]
        ranked = _ranked({name: history[name][number] for name in alive}, ceiling)
        best = ranked[0]
        champion = history[best][number]
        for name in ranked[1:]:
            if is_clearly_worse(history[name][number], champion, ceiling, level=level):
                stopped[name] = "behind"
        ranked = [name for name in ranked if name not in stopped]
        rest = costs[number + 1 :]
        if budget is not None and rest:
            left = budget - spent
            affordable = max(left // (len(rest) * rest[0]), left // sum(rest))
            stopped |= dict.fromkeys(ranked[max(1, affordable) :], "budget")
        alive = [name for name in alive if name not in stopped]
        if len(alive) == 1:
            break
    standings = [
        _standing(
            name, history[name], history[best], ceilings, costs, stopped.get(name), name == best
        )
        for name in names
    ]
    ties = [standing for standing in standings if standing.stopped is None]
    chosen = next(s.name for s in ties if s.gap is None or s.gap.p_value >= EVEN)
    order = sorted(
        standings, key=lambda s: (-s.rounds, -(s.average.value if s.average else 0), s.name != best)
    )
    return Outcome(tuple(order), best, tuple(tie.name for tie in ties), chosen)


def _ranked(scores: Mapping[str, Scores], ceiling: Scores) -> list[str]:
    """Return candidates, the highest average first; of equal ones, by name in whatever order."""
    return sorted(scores, key=lambda name: (-(mean_ratio(scores[name], ceiling) or 0), name))


def _standing(
    name: str,
    own: Sequence[Scores],
    best: Sequence[Scores],
    ceilings: Sequence[Scores],
    costs: Sequence[int],
    stopped: Literal["behind", "budget"] | None,
    is_best: bool,
) -> Standing:
    last = len(own) - 1
    return Standing(
        name,
        len(own),
        sum(costs[: len(own)]),
        tuple(
            normalised_average(scores, ceiling)
            for scores, ceiling in zip(own, ceilings, strict=False)
        ),
        None if is_best else difference(own[last], best[last], ceilings[last]),
        stopped,
    )
