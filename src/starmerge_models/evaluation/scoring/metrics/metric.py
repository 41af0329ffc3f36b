"""A metric, the scores that it gives, and their intervals by resampling the rows."""

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
"""Bootstrap resamples behind an interval."""

BLOCK = 250
"""Resamples worked on at once: bounds the memory to a few arrays of (BLOCK, rows)."""


@dataclass(frozen=True)
class Prediction:
    """What one model answered to one row, and what was read from it."""

    id: str
    """Where the row stands in its source: "test/17"."""
    response: str
    value: str | float | None
    """The label, text or number that was read; None where none could be read."""
    gold: str
    credit: float | None
    """What the row earns, 0 to 1; None where only all rows together have a score."""
    shortened: bool = False
    """Whether the passage was cut to fit the context."""


@dataclass(frozen=True)
class Score:
    """The score of one model on one task."""

    metric: str
    """The metric's name."""
    computed_by: Metric = field(repr=False)
    value: float
    """NaN where the metric is undefined: a correlation with a constant."""
    low: float
    """Lower end of the 95 % interval; NaN where there is none."""
    high: float
    n: int
    unparsed: float
    """Share of responses from which no answer could be read."""
    shortened: int
    """Rows whose passage was cut."""
    predictions: tuple[Prediction, ...] = field(repr=False)
    labels: tuple[str, ...] = ()
    """The labels of a closed task; what F1 is depends on whether there are any."""
    left_out: int = 0
    """Resamples without a value, left out of the interval."""


def resample(
    scores: Sequence[Score], generator: np.random.Generator | None = None
) -> list[NDArray[np.float64]]:
    """Return the value of each score in bootstrap resamples of the rows, the same for all.

    Rows that are alike in all scores are drawn together: their number in a resample is
    multinomial. So accuracies need a draw for each pattern of right and wrong, not for each row,
    and the order of the rows does not matter.

    Args:
        scores: Of one or more models on one task, with their rows in the same order.
        generator: Where the draws come from; a new one of seed 0 when None.

    Returns:
        For each score (:data:`RESAMPLES`,) float64; NaN where a resample has no value.
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
    """Return the ends of the 95 % percentile interval of resamples, and how many are NaN.

    Those are left out. The ends are NaN when nothing remains.
    """
    defined = samples[~np.isnan(samples)]
    left_out = samples.size - defined.size
    if not defined.size:
        return math.nan, math.nan, left_out
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high), left_out


class Reader(Protocol):
    """What a metric must know of a task's matcher."""

    @property
    def name(self) -> str:
        """The name that the task has it by."""

    @property
    def is_graded(self) -> bool:
        """Whether a row may earn part of a point."""

    @property
    def reads_numbers(self) -> bool:
        """Whether it reads numbers."""


Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From (resamples, patterns), how often each pattern of a row was drawn, to (resamples,)."""


class Metric(ABC):
    """A way to score all rows of a task together; 1 is the score of right answers.

    To define one, decorate a function with :func:`metric`.
    """

    name: str
    __qualname__: str
    earns: ClassVar[bool] = True
    """Whether a row earns what its matcher gives it; else all rows together have a score alone."""

    def check(self, matcher: Reader | None, *, closed: bool) -> None:  # noqa: B027
        """Make sure that a task can be scored so.

        Args:
            matcher: What reads its responses; None: they need not be read.
            closed: Whether it has labels.

        Raises:
            ValueError: It cannot.
        """

    def read(self, prediction: Prediction) -> Prediction:
        """Return a prediction with what its row earns by this metric."""
        return prediction

    @abstractmethod
    def rows(self, score: Score) -> list[tuple[Any, ...]]:
        """Return what the metric sees of each row.

        Rows that count alike look alike, so that they are sorted alike: numbers are floats, 0.0 has
        no sign.

        Raises:
            UsageError: It cannot use one, named by its id.
        """

    @abstractmethod
    def value(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> float:
        """Return the metric of all rows, NaN where it is undefined."""

    @abstractmethod
    def statistic(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> Statistic:
        """Return the metric as a function of how often each of the rows was drawn."""

    def interval(self, score: Score) -> tuple[float, float, int]:
        """Return the ends of the 95 % interval, and how many resamples have no value."""
        low, high, left_out = percentiles(resample([score])[0])
        if high - low < 1e-9:
            low, high = self.unvaried(score)
        return low, high, left_out

    def unvaried(self, score: Score) -> tuple[float, float]:
        """Return the ends of the interval where all resamples are alike; NaN: it has none."""
        return math.nan, math.nan

    def paired_test(self, first: Score, second: Score) -> tuple[float, str] | None:
        """Return the two-sided p-value of a test of this metric's own, and the test's name.

        Args:
            first: A model's score by this metric.
            second: Another's, of the same rows in the same order.

        Returns:
            None where the metric has no test: the paired bootstrap then serves.
        """
        return None
