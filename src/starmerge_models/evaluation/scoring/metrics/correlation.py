"""Correlations of the parsed numbers with the right ones: Pearson's and Spearman's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.metrics.metric import (
    Metric,
    Prediction,
    Reader,
    Score,
    Statistic,
)


class Correlation(Metric):
    """Pearson's correlation, as SciPy computes it, of the numbers or of their ranks."""

    has_row_credits = False

    def __init__(self, name: str, *, ranked: bool) -> None:
        self.name, self._ranked = name, ranked

    def check(self, matcher: Reader | None, *, closed: bool) -> None:
        """Refuse a matcher that does not parse numbers."""
        if matcher is None or not matcher.reads_numbers:
            raise ValueError(f"metric {self.name!r} is of numbers: it needs match 'number'")

    def rows(self, score: Score) -> list[tuple[Any, ...]]:
        """Return the right number and the parsed one (None if unreadable) of each row."""
        return [(_number(p, p.gold), _number(p, p.value)) for p in score.predictions]

    def value(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> float:
        """Return the correlation; NaN if it is undefined."""
        return _correlation(rows, ranked=self._ranked)

    def statistic(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> Statistic:
        """Return the correlation as a function of how often each row was drawn."""
        gold, answers, read = _numbers(rows)
        ranked = self._ranked
        return lambda counts: _counted_correlation(gold, answers, read, counts, ranked=ranked)


def _number(prediction: Prediction, value: str | float | None) -> float | None:
    try:
        return None if value is None else float(value) + 0.0  # −0.0 becomes 0.0
    except ValueError:
        raise UsageError(
            f"Row {prediction.id!r} has {value!r} where a correlation needs a number. "
            "Choose accuracy or f1, or mend the row."
        ) from None


def _correlation(rows: Sequence[tuple[float, float | None]], *, ranked: bool) -> float:
    from scipy.stats import pearsonr, rankdata  # noqa: PLC0415

    gold, answers, read = _numbers(rows)
    readable = answers[read]
    if readable.size < 3 or np.ptp(readable) == 0 or np.ptp(gold) == 0:
        return math.nan
    if ranked:
        gold, readable = rankdata(gold), rankdata(readable)
    filled = np.full(gold.size, readable.mean())
    filled[read] = readable
    return float(pearsonr(gold, filled).statistic)


def _numbers(
    rows: Sequence[tuple[float, float | None]],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return gold, answers (0 if unreadable) and whether they are readable; (rows,) each."""
    gold, answers = zip(*rows, strict=True)
    read = np.array([answer is not None for answer in answers])
    return np.array(gold), np.array([answer or 0.0 for answer in answers]), read


def _counted_correlation(
    gold: NDArray[np.float64],
    answers: NDArray[np.float64],
    read: NDArray[np.bool_],
    counts: NDArray[np.float64],
    *,
    ranked: bool,
) -> NDArray[np.float64]:
    """Return the correlation in each resample; an unreadable answer has deviation 0."""
    counts_read = counts * read
    x, x_sum = _deviations(answers, counts_read, ranked=ranked)
    y, y_sum = _deviations(gold, counts, ranked=ranked)
    undefined = (counts_read.sum(axis=1) < 3) | (x_sum == 0) | (y_sum == 0)
    squared = np.where(undefined, np.nan, x_sum * y_sum)
    values: NDArray[np.float64] = (counts_read * x * y).sum(axis=1) / np.sqrt(squared)
    return np.clip(values, -1, 1)


def _deviations(
    values: NDArray[np.float64], counts: NDArray[np.float64], *, ranked: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the deviations from each resample's mean, and the sums of their squares.

    Args:
        values: (patterns,).
        counts: (resamples, patterns).
        ranked: Whether to use the ranks of the values; equal values have their mean rank.

    Returns:
        (resamples, patterns) and (resamples,); exactly 0 if all drawn values are equal.
    """
    order = np.argsort(values, kind="stable")
    distinct, first = np.unique(values[order], return_index=True)
    drawn = np.add.reduceat(counts[:, order], first, axis=1)  # (resamples, distinct)
    points = np.cumsum(drawn, axis=1) - (drawn - 1) / 2 if ranked else distinct[None]
    size = np.maximum(drawn.sum(axis=1, keepdims=True), 1)
    centred = points - (drawn * points).sum(axis=1, keepdims=True) / size
    varied = (drawn > 0).sum(axis=1) > 1
    squares = np.where(varied, (drawn * centred**2).sum(axis=1), 0)
    deviations: NDArray[np.float64] = centred[:, np.searchsorted(distinct, values)]
    return deviations, squares
