"""The interface of metrics, their scores, and bootstrap intervals over the rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
"""Number of bootstrap resamples of an interval."""

BLOCK = 250
"""Resamples computed at once, which bounds the memory to a few arrays of (BLOCK, rows)."""


@dataclass(frozen=True)
class Prediction:
    """One model's response to one row, the parsed answer and the credit."""

    id: str
    """The row's id in its source: "test/17"."""
    response: str
    value: str | float | None
    """The parsed label, text or number; None if unreadable."""
    gold: str
    credit: float | None
    """The row's credit, 0 to 1; None where the metric is defined only for all rows together."""
    shortened: bool = False
    """Whether the passage was truncated to fit into the context."""


@dataclass(frozen=True)
class Score:
    """The score of one model on one task."""

    metric: str
    """The metric's name."""
    computed_by: Metric = field(repr=False)
    value: float
    """NaN if the metric is undefined: a correlation with a constant."""
    low: float
    """Lower end of the 95 % interval; NaN if there is none."""
    high: float
    n: int
    unparsed: float
    """Share of unreadable responses."""
    shortened: int
    """Number of rows with a truncated passage."""
    predictions: tuple[Prediction, ...] = field(repr=False)
    labels: tuple[str, ...] = ()
    """The labels of a task with a closed set; F1 is macro-F1 if there are any."""
    left_out: int = 0
    """Number of resamples without a value, which the interval ignores."""


def resample(
    scores: Sequence[Score], generator: np.random.Generator | None = None
) -> list[NDArray[np.float64]]:
    """Return the value of each score in bootstrap resamples of the rows, the same for all scores.

    Rows with equal values in all scores form one pattern, whose count in a resample is
    multinomial. So accuracies need a draw for each pattern of right and wrong, not for each row,
    and the order of the rows does not matter.

    Args:
        scores: Scores of one or more models on one task, with the rows in the same order.
        generator: Random generator; None: a new one with seed 0.

    Returns:
        For each score (:data:`RESAMPLES`,) float64; NaN for a resample without a value.
    """
    generator = generator or np.random.default_rng(0)
    tally = Counter(zip(*(one.computed_by.rows(one) for one in scores), strict=True))
    patterns = sorted(tally, key=repr)
    n = scores[0].n
    shares = [tally[pattern] / n for pattern in patterns]
    statistics = [
        one.computed_by.statistic(one, rows)
        for one, rows in zip(scores, zip(*patterns, strict=True), strict=True)
    ]
    blocks = []
    for _ in range(RESAMPLES // BLOCK):
        counts = generator.multinomial(n, shares, size=BLOCK).astype(np.float64)
        blocks.append([statistic(counts) for statistic in statistics])
    return [np.concatenate(parts) for parts in zip(*blocks, strict=True)]


def percentiles(samples: NDArray[np.float64]) -> tuple[float, float, int]:
    """Return the ends of the 95 % percentile interval of resamples, and the number of NaNs.

    NaNs are ignored. The ends are NaN if all values are.
    """
    defined = samples[~np.isnan(samples)]
    left_out = samples.size - defined.size
    if not defined.size:
        return math.nan, math.nan, left_out
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high), left_out


class Reader(Protocol):
    """The properties of a task's matcher that metrics need."""

    @property
    def name(self) -> str:
        """The matcher's name."""

    @property
    def is_graded(self) -> bool:
        """Whether credits may be fractional."""

    @property
    def reads_numbers(self) -> bool:
        """Whether the matcher parses numbers."""


Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From counts (resamples, patterns) of how often each pattern was drawn to (resamples,) values."""


class Metric(ABC):
    """A metric over all rows of a task; perfect answers have the score 1.

    To define one, decorate a function with :func:`metric`.
    """

    name: str
    __qualname__: str
    has_row_credits: ClassVar[bool] = True
    """Whether rows keep their matcher's credit; otherwise only all rows together have a score."""

    def check(self, matcher: Reader | None, *, closed: bool) -> None:  # noqa: B027
        """Make sure that the metric fits a task.

        Args:
            matcher: The task's matcher; None for images, whose responses need no parsing.
            closed: Whether the task has labels.

        Raises:
            ValueError: The metric does not fit.
        """

    def read(self, prediction: Prediction) -> Prediction:
        """Return a prediction with the credit that this metric gives."""
        return prediction

    @abstractmethod
    def rows(self, score: Score) -> list[tuple[Any, ...]]:
        """Return the values of each row that the metric depends on.

        Equivalent rows must have equal values with equal ``repr``: numbers are floats, 0.0 has no
        sign.

        Raises:
            UsageError: The metric cannot use a row; the message has the row's id.
        """

    @abstractmethod
    def value(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> float:
        """Return the metric of all rows; NaN if it is undefined."""

    @abstractmethod
    def statistic(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> Statistic:
        """Return the metric as a function of how often each row was drawn."""

    def interval(self, score: Score) -> tuple[float, float, int]:
        """Return the ends of the 95 % interval, and the number of resamples without a value."""
        low, high, left_out = percentiles(resample([score])[0])
        if high - low < 1e-9:
            low, high = self.degenerate_interval(score)
        return low, high, left_out

    def degenerate_interval(self, score: Score) -> tuple[float, float]:
        """Return the ends of the interval if all resamples are equal; NaN: there is none."""
        return math.nan, math.nan

    def paired_test(self, first: Score, second: Score) -> tuple[float, str] | None:
        """Return the two-sided p-value of a test specific to this metric, and the test's name.

        Args:
            first: A model's score by this metric.
            second: Another model's score, on the same rows in the same order.

        Returns:
            None if the metric has no such test: the caller then uses the paired bootstrap.
        """
        return None
