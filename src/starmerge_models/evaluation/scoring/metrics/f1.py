"""F1: macro-F1 of a closed set of labels, or the mean of the rows' token F1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.metrics.means import Credits
from starmerge_models.evaluation.scoring.metrics.metric import Reader, Score, Statistic


class F1(Credits):
    """Macro-F1 with labels; without labels, the mean of the rows' token F1."""

    name = "f1"

    def check(self, matcher: Reader | None, *, closed: bool) -> None:
        """Refuse a task without labels whose matcher has no fractional credits."""
        if not closed and (matcher is None or not matcher.is_graded):
            raise ValueError("metric 'f1' needs labels, or match 'token-f1'")

    def rows(self, score: Score) -> list[tuple[Any, ...]]:
        """Return each row's right and parsed label, or its credit for a task without labels."""
        if not score.labels:
            return super().rows(score)
        for p in score.predictions:
            if p.gold not in score.labels:
                raise UsageError(
                    f"Row {p.id!r} has the answer {p.gold!r}, which is no label of its task "
                    f"({', '.join(score.labels)}). Add it to the labels."
                )
        return [(p.gold, p.value) for p in score.predictions]

    def value(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> float:
        """Return F1, computed by scikit-learn."""
        if not score.labels:
            return super().value(score, rows)
        from sklearn.metrics import f1_score  # noqa: PLC0415

        present = sorted({gold for gold, _ in rows})
        codes = {label: code for code, label in enumerate(present)}
        gold = [codes[answer] for answer, _ in rows]
        read = [codes.get(answer, -1) for _, answer in rows]
        return float(f1_score(gold, read, labels=range(len(present)), average="macro"))

    def statistic(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> Statistic:
        """Return F1 as a function of how often each row was drawn."""
        if not score.labels:
            return super().statistic(score, rows)
        return lambda counts: _counted_f1(rows, counts)


def _counted_f1(
    rows: Sequence[tuple[str, str | None]], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Macro-F1 over the labels that occur in a resample: 2·hits / (gold + predicted) of each."""
    total, present = np.zeros(len(counts)), np.zeros(len(counts))
    for label in sorted({gold for gold, _ in rows}):
        is_gold = np.array([gold == label for gold, _ in rows], np.float64)
        is_value = np.array([value == label for _, value in rows], np.float64)
        golds = counts @ is_gold
        total += 2 * (counts @ (is_gold * is_value)) / np.maximum(golds + counts @ is_value, 1)
        present += golds > 0
    return total / present
