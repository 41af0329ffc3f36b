"""A race of candidates over a growing number of rows: clearly worse candidates stop early.

The race knows neither models nor tasks: it gets scores and decides which candidates continue.
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

FIRST_ROWS = 8
"""Rows of a task in the first round; each further round doubles the number."""

TIE_LEVEL = 0.5
"""Smallest p-value of a tie: equally good candidates differ at least as much half of the time."""

Scores = Mapping[str, Score]
"""Scores by task."""

Ask = Callable[[Sequence[str], int], Mapping[str, Scores]]
"""From candidates and the index of a round to the scores of each on all rows up to that round."""


def round_sizes(rows: int) -> list[int]:
    """Return the total number of rows of a task after each round: 8, 16, 32 … rows."""
    found = []
    size = FIRST_ROWS
    while size < rows:
        found.append(size)
        size *= 2
    return [*found, rows]


@dataclass(frozen=True)
class Standing:
    """A candidate's result."""

    name: str
    rounds: int
    """Number of rounds before it stopped."""
    rows: int
    """Number of rows that it answered, over all tasks."""
    averages: tuple[Interval | None, ...]
    """Its normalised average on all rows after each of its rounds; None if undefined."""
    gap: Difference | None
    """Its average − that of the race's best on the same rows, paired; None for the best itself,
    and if an average is undefined."""
    stopped: Literal["behind", "budget"] | None
    """Why the candidate stopped: it was clearly behind, or the budget was too small for another
    round. None: it reached the end of the race."""

    @property
    def average(self) -> Interval | None:
        """Its normalised average on all rows that it answered."""
        return self.averages[-1]


@dataclass(frozen=True)
class Outcome:
    """The result of a race."""

    standings: tuple[Standing, ...]
    """Sorted by the number of rounds, then by average, both descending."""
    best: str
    """The candidate with the highest average in the last round."""
    ties: tuple[str, ...]
    """The best, and the candidates that did not stop, without a clear difference from the best; in
    the given order of the candidates."""
    chosen: str
    """The first, in the given order, of the ties whose difference from the best has p ≥ 0.5. (A
    candidate with a lower p-value may well be worse, although the difference is not clear.)"""


def race(
    names: Sequence[str],
    ask: Ask,
    ceilings: Sequence[Scores],
    costs: Sequence[int],
    budget: int | None = None,
) -> Outcome:
    """Evaluate candidates on a growing number of rows until the last round, or until one is left.

    After each round, a candidate stops if its normalised average is clearly below that of the best
    of the round: if the paired p-value is at most 0.05/m, where m = (candidates − 1) · rounds is
    the number of comparisons that the truly best candidate could lose (Bonferroni). So the truly
    best candidate never stops for being behind, with a probability of at least 95 %.

    Without a budget there is no other reason to stop: equally good candidates all reach the last
    round, at the cost of a full evaluation. With a budget, the remaining rows are divided equally
    among the remaining rounds, as in successive halving (arXiv 1502.07943), and the best candidates
    continue, as many as a round's share allows; or more, if the budget allows all their rounds.

    The order of the names matters only for ties.

    Args:
        names: The candidates.
        ask: Evaluates some candidates on the rows of a round.
        ceilings: For each round, the fine-tunes' scores on all rows up to this round.
        costs: For each round, the number of rows for one candidate.
        budget: Most rows in total; at least the first round of all candidates.
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
    chosen = next(s.name for s in ties if s.gap is None or s.gap.p_value >= TIE_LEVEL)
    order = sorted(
        standings, key=lambda s: (-s.rounds, -(s.average.value if s.average else 0), s.name != best)
    )
    return Outcome(tuple(order), best, tuple(tie.name for tie in ties), chosen)


def _ranked(scores: Mapping[str, Scores], ceiling: Scores) -> list[str]:
    """Return candidates by descending average, ties by name."""
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
