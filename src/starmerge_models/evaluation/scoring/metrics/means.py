"""Metrics that are the mean of the rows' credits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean
from typing import Any

import numpy as np

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.metrics.metric import Metric, Prediction, Score, Statistic


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
    return _wilson(round(value * n), n)


@lru_cache(maxsize=4096)
def _wilson(right: int, n: int) -> tuple[float, float]:
    """Return the interval; cached, as scipy computes a p-value first, which takes 5 ms."""
    from scipy.stats import binomtest  # noqa: PLC0415  (0.5 s that only a score needs)

    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
