"""Metrics that are the mean of the rows' credits."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean
from typing import Any

import numpy as np

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.metrics.metric import Metric, Prediction, Score, Statistic

_Z = 1.959963984540054
"""Standard deviations on either side of the mean that hold 95 % of a normal distribution."""


class Credits(Metric):
    """The mean of the rows' credits."""

    def rows(self, score: Score) -> list[tuple[Any, ...]]:
        """Return each row's credit."""
        return [(self.credit(p),) for p in score.predictions]

    def credit(self, prediction: Prediction) -> float:
        """Return a row's credit.

        Raises:
            UsageError: The row has no credit, or one that the metric cannot use.
        """
        if prediction.credit is None:
            raise self.unusable(prediction, "a number from 0 to 1")
        return float(prediction.credit)

    def unusable(self, prediction: Prediction, needed: str) -> UsageError:
        """Return the error about a row whose credit the metric cannot use."""
        return UsageError(
            f"Row {prediction.id!r} has the credit {prediction.credit}, and {self.name} needs "
            f"{needed}. Choose a metric that goes with the task's matcher."
        )

    def value(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> float:
        """Return the mean."""
        return fmean(credit for (credit,) in rows)

    def statistic(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> Statistic:
        """Return the mean as a function of how often each row was drawn."""
        credits_ = np.array([credit for (credit,) in rows], np.float64)
        return lambda counts: counts @ credits_ / counts.sum(axis=1)

    def degenerate_interval(self, score: Score) -> tuple[float, float]:
        """Return Wilson's interval."""
        return wilson(score.value, score.n)


def wilson(value: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share of n rows."""
    # As scipy.stats.binomtest, which also computes a p-value and takes a hundred times as long.
    right = round(value * n)
    p, q = right / n, 1 - right / n
    width = 2 * (n + _Z**2)
    centre = (2 * n * p + _Z**2) / width
    delta = _Z / width * sqrt(4 * n * p * q + _Z**2)
    return centre - delta if right else 0.0, centre + delta if right < n else 1.0
