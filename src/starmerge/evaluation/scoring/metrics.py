"""Scores with their uncertainty: accuracy, F1, correlations, and metrics of plug-ins."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from starmerge.errors import StarmergeError, UsageError
from starmerge.plugins import Registry

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
    predictions: tuple[Prediction, ...]
    labels: tuple[str, ...] = ()
    """The labels of a closed task; what F1 is depends on whether there are any."""
    left_out: int = 0
    """Resamples without a value, left out of the interval."""


def score(
    predictions: Sequence[Prediction], metric: str | Metric, labels: Sequence[str] = ()
) -> Score:
    """Summarise the predictions of one model for one task.

    accuracy
        The share of right answers, credits that are 0 or 1; an unreadable answer has 0. The
        interval is Wilson's.
    f1, with labels
        The mean over the labels of their F1 (macro-F1). An unreadable answer is a miss of its
        gold label and a prediction of none. A label that no row has as its gold answer has no
        F1 and is left out of the mean: with it, right answers alone would not earn 1.
    f1, without labels
        The mean of the rows' credits, their token F1.
    spearman, pearson
        The correlation of the numbers read with the gold ones. An unreadable answer counts as
        the mean of the readable ones (of their ranks, for Spearman, so that the scale of the
        answers does not matter): it tells nothing and invents nothing. When a share u is
        unreadable at random, the correlation falls to √(1 − u) of what it was. It is NaN when
        fewer than 3 answers are readable, or all of them or all gold numbers are equal.
    another
        A plug-in's: the mean of what it gives each row, or what it makes of the sums over the rows;
        see :func:`metric`.

    The interval of F1 and of correlations is the percentile interval of :data:`RESAMPLES` bootstrap
    resamples of the rows, with a fixed seed. The percentile one, since the comparisons of two
    models have it too and it bears resamples without a value, which are left out and counted.
    Where all resamples are alike (every answer right) they say nothing of the rows that were not
    seen: a mean and F1 then have Wilson's interval at their value, others none (NaN).

    Args:
        predictions: One for each row.
        metric: One of :data:`METRICS`, or what that finds under its name.
        labels: The labels of a closed task, as gold and values have them.

    Raises:
        UsageError: No predictions; an unknown metric; a row that the metric cannot use, named
            by its id.
    """
    if not predictions:
        raise UsageError("There are no predictions to score. Give the task at least one row.")
    how = METRICS.find(metric) if isinstance(metric, str) else metric
    predictions = [how.read(prediction) for prediction in predictions]
    n = len(predictions)
    bare = Score(
        metric=how.name,
        computed_by=how,
        value=math.nan,
        low=math.nan,
        high=math.nan,
        n=n,
        unparsed=sum(p.value is None for p in predictions) / n,
        shortened=sum(p.shortened for p in predictions),
        predictions=tuple(predictions),
        labels=tuple(labels),
    )
    value = how.value(bare, how.rows(bare))
    if math.isnan(value):
        return bare
    low, high, left_out = how.interval(replace(bare, value=value))
    return replace(bare, value=value, low=low, high=high, left_out=left_out)


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


def _wilson(value: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share of n rows."""
    from scipy.stats import binomtest  # noqa: PLC0415  (0.5 s that only a score needs)

    interval = binomtest(round(value * n), n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


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

    def check(self, *, match: str | None, closed: bool) -> None:  # noqa: B027
        """Make sure that a task can be scored so.

        Args:
            match: How its answers are read; None: they need not be.
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


def _fault(thing: Any) -> str | None:
    """Return why something is no metric that can be used."""
    if isinstance(thing, Metric):
        return None
    if callable(thing):
        return 'it is not decorated. Write @metric("name") above the function of one row'
    return f"it is of the type {type(thing).__name__}, and a metric is a function of one row"


METRICS: Registry[Metric] = Registry("metric", "starmerge.metrics", fault=_fault)
"""Every metric by name; other packages and files have more."""


def metric(
    name: str, of: Callable[[NDArray[np.float64]], float] | None = None
) -> Callable[[Callable[[Prediction], Any]], Metric]:
    """Make the decorated function of one row a metric called ``name``.

    Without ``of`` the function returns what the row earns, from 0 to 1, and the score is the mean.
    With it, the function returns some numbers, always as many; they are summed over the rows, and
    the score is what ``of`` makes of the sums: so can scores be written that are no mean over
    rows, such as BLEU, of counts of n-grams.

    Either way the score of right answers should be 1, and more should be better. The function sees
    the whole :class:`Prediction`: the response, what the task's matcher read in it, and the right
    answer.

    Args:
        name: The name, in tables and task files.
        of: From the sums, (k,) float64, to the score; NaN where it is undefined.

    Raises:
        UsageError: Another metric has the name.

    Example:
        .. code-block:: python

            @metric("brevity")
            def brevity(row: Prediction) -> float:
                return min(1.0, len(row.gold) / max(1, len(row.response)))
    """

    def register(function: Callable[[Prediction], Any]) -> Metric:
        made = _RowMean(name, function) if of is None else _RowSums(name, function, of)
        METRICS.add(name, made)
        return made

    return register


class _Credits(Metric):
    """The mean of what the rows earn."""

    def rows(self, score: Score) -> list[tuple[Any, ...]]:
        return [(self.credit(p),) for p in score.predictions]

    def credit(self, prediction: Prediction) -> float:
        """Return what a row earns.

        Raises:
            UsageError: It earns nothing by itself, or a number that the metric cannot use.
        """
        if prediction.credit is None:
            raise self.unusable(prediction, "a number from 0 to 1")
        return float(prediction.credit)

    def unusable(self, prediction: Prediction, needed: str) -> UsageError:
        return UsageError(
            f"Row {prediction.id!r} has the credit {prediction.credit}, and {self.name} needs "
            f"{needed}. Choose a metric that goes with the task's matcher."
        )

    def value(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> float:
        return fmean(credit for (credit,) in rows)

    def statistic(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> Statistic:
        credits_ = np.array([credit for (credit,) in rows], np.float64)
        return lambda counts: counts @ credits_ / counts.sum(axis=1)

    def unvaried(self, score: Score) -> tuple[float, float]:
        return _wilson(score.value, score.n)


class _Accuracy(_Credits):
    name = "accuracy"

    def check(self, *, match: str | None, closed: bool) -> None:
        if match == "token-f1":
            raise ValueError("match 'token-f1' needs metric 'f1'")

    def credit(self, prediction: Prediction) -> float:
        if prediction.credit not in (0, 1):
            raise self.unusable(prediction, "0 or 1")
        return float(prediction.credit)

    def interval(self, score: Score) -> tuple[float, float, int]:
        return *_wilson(score.value, score.n), 0


class _F1(_Credits):
    """Macro-F1 with labels, the mean of the rows' token F1 without."""

    name = "f1"

    def check(self, *, match: str | None, closed: bool) -> None:
        if not closed and match != "token-f1":
            raise ValueError("metric 'f1' needs labels, or match 'token-f1'")

    def rows(self, score: Score) -> list[tuple[Any, ...]]:
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
        """Return it as scikit-learn computes it."""
        if not score.labels:
            return super().value(score, rows)
        from sklearn.metrics import f1_score  # noqa: PLC0415

        present = sorted({gold for gold, _ in rows})
        codes = {label: code for code, label in enumerate(present)}
        gold = [codes[answer] for answer, _ in rows]
        read = [codes.get(answer, -1) for _, answer in rows]
        return float(f1_score(gold, read, labels=range(len(present)), average="macro"))

    def statistic(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> Statistic:
        if not score.labels:
            return super().statistic(score, rows)
        return lambda counts: _counted_f1(rows, counts)


class _Correlation(Metric):
    """Pearson's correlation, as SciPy computes it, of the numbers or of their ranks."""

    earns = False

    def __init__(self, name: str, *, ranked: bool) -> None:
        self.name, self._ranked = name, ranked

    def check(self, *, match: str | None, closed: bool) -> None:
        if match != "number":
            raise ValueError(f"metric {self.name!r} is of numbers: it needs match 'number'")

    def rows(self, score: Score) -> list[tuple[Any, ...]]:
        return [(_number(p, p.gold), _number(p, p.value)) for p in score.predictions]

    def value(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> float:
        return _correlation(rows, ranked=self._ranked)

    def statistic(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> Statistic:
        gold, answers, read = _numbers(rows)
        ranked = self._ranked
        return lambda counts: _counted_correlation(gold, answers, read, counts, ranked=ranked)


class _RowMean(_Credits):
    """The mean of what a function of one row returns."""

    def __init__(self, name: str, function: Callable[[Prediction], Any]) -> None:
        self.name, self._function = name, function
        self.__doc__, self.__module__ = function.__doc__, function.__module__
        self.__qualname__ = function.__qualname__

    def read(self, prediction: Prediction) -> Prediction:
        return replace(prediction, credit=_numbers_of(self, self._function, prediction)[0])

    def credit(self, prediction: Prediction) -> float:
        if prediction.credit is None or not 0 <= prediction.credit <= 1:
            raise self.unusable(
                prediction, "a number from 0 to 1: the metric's function returns it"
            )
        return prediction.credit


class _RowSums(Metric):
    """What a function makes of the sums of the numbers that another returns for each row."""

    earns = False

    def __init__(
        self,
        name: str,
        function: Callable[[Prediction], Any],
        of: Callable[[NDArray[np.float64]], float],
    ) -> None:
        self.name, self._function, self._of = name, function, of
        self.__doc__, self.__module__ = function.__doc__, function.__module__
        self.__qualname__ = function.__qualname__

    def read(self, prediction: Prediction) -> Prediction:
        return replace(prediction, credit=None)

    def rows(self, score: Score) -> list[tuple[Any, ...]]:
        found = [_numbers_of(self, self._function, p) for p in score.predictions]
        for numbers, p in zip(found, score.predictions, strict=True):
            if len(numbers) != len(found[0]):
                raise UsageError(
                    f"Row {p.id!r}: the metric {self.name!r} returns {len(numbers)} numbers, and "
                    f"{len(found[0])} for the first row. It must return as many for each."
                )
        return found

    def value(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> float:
        return float(self.statistic(score, rows)(np.ones((1, len(rows))))[0])

    def statistic(self, score: Score, rows: Sequence[tuple[Any, ...]]) -> Statistic:
        numbers = np.array(rows, np.float64)

        def scores(counts: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.array([self._score(sums) for sums in counts @ numbers], np.float64)

        return scores

    def _score(self, sums: NDArray[np.float64]) -> float:
        try:
            return float(self._of(sums))
        except Exception as error:  # whatever the plug-in's own code raises
            raise StarmergeError(
                f"The metric {self.name!r} cannot be computed of the sums {sums.tolist()}: "
                f"{type(error).__name__}: {error}."
            ) from error


METRICS.add("accuracy", _Accuracy())
METRICS.add("f1", _F1())
METRICS.add("spearman", _Correlation("spearman", ranked=True))
METRICS.add("pearson", _Correlation("pearson", ranked=False))


def _numbers_of(
    metric: Metric, function: Callable[[Prediction], Any], prediction: Prediction
) -> tuple[float, ...]:
    """Return what a plug-in's function returns for a row, one number or several.

    Raises:
        StarmergeError: It raises, or returns something else; the message names the row.
    """
    try:
        returned = function(prediction)
        numbers = [returned] if isinstance(returned, int | float) else list(returned)
        found = tuple(float(number) + 0.0 for number in numbers)  # −0.0 becomes 0.0
    except Exception as error:  # whatever the plug-in's own code raises
        raise StarmergeError(
            f"The metric {metric.name!r} failed at row {prediction.id!r}: "
            f"{type(error).__name__}: {error}."
        ) from error
    if not found or not all(map(math.isfinite, found)):
        raise StarmergeError(
            f"The metric {metric.name!r} returns {returned!r} for row {prediction.id!r}. It must "
            "return finite numbers."
        )
    return found


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
    """Return gold, answers (0 where unreadable) and whether they are readable, (rows,) each."""
    gold, answers = zip(*rows, strict=True)
    read = np.array([answer is not None for answer in answers])
    return np.array(gold), np.array([answer or 0.0 for answer in answers]), read


def _counted_f1(
    rows: Sequence[tuple[str, str | None]], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Macro-F1 over the labels that a resample has: 2·hits / (gold + predicted) of each."""
    total, present = np.zeros(len(counts)), np.zeros(len(counts))
    for label in sorted({gold for gold, _ in rows}):
        is_gold = np.array([gold == label for gold, _ in rows], np.float64)
        is_value = np.array([value == label for _, value in rows], np.float64)
        golds = counts @ is_gold
        total += 2 * (counts @ (is_gold * is_value)) / np.maximum(golds + counts @ is_value, 1)
        present += golds > 0
    return total / present


def _counted_correlation(
    gold: NDArray[np.float64],
    answers: NDArray[np.float64],
    read: NDArray[np.bool_],
    counts: NDArray[np.float64],
    *,
    ranked: bool,
) -> NDArray[np.float64]:
    """Return the correlation in each resample; an unreadable answer deviates from no mean."""
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
        ranked: Whether the values' ranks are meant, equal values sharing the mean of theirs.

    Returns:
        (resamples, patterns) and (resamples,), 0 exactly where all values drawn are equal.
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
