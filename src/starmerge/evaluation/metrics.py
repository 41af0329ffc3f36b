"""Scores with their uncertainty: accuracy, F1, correlations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starmerge.errors import UsageError

RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""

METRICS = ("accuracy", "f1", "spearman", "pearson")

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


def score(predictions: Sequence[Prediction], metric: str, labels: Sequence[str] = ()) -> Score:
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

    The interval of F1 and of correlations is the percentile interval of :data:`RESAMPLES` bootstrap
    resamples of the rows, with a fixed seed. The percentile one, since the comparisons of two
    models have it too and it bears resamples without a value, which are left out and counted.
    Where all resamples are alike (every answer right) they say nothing of the rows that were not
    seen: F1 then has Wilson's interval at its value, a correlation none (NaN).

    Args:
        predictions: One for each row.
        metric: One of :data:`METRICS`.
        labels: The labels of a closed task, as gold and values have them.

    Raises:
        UsageError: No predictions; an unknown metric; a row that the metric cannot use, named
            by its id.
    """
    if not predictions:
        raise UsageError("There are no predictions to score. Give the task at least one row.")
    if metric not in METRICS:
        raise UsageError(f"There is no metric {metric!r}. Use one of {', '.join(METRICS)}.")
    n = len(predictions)
    bare = Score(
        metric=metric,
        value=math.nan,
        low=math.nan,
        high=math.nan,
        n=n,
        unparsed=sum(p.value is None for p in predictions) / n,
        shortened=sum(p.shortened for p in predictions),
        predictions=tuple(predictions),
        labels=tuple(labels),
    )
    rows = _rows(bare)
    if metric == "accuracy":
        value = fmean(credit for (credit,) in rows)
        low, high = _wilson(value, n)
        return replace(bare, value=value, low=low, high=high)
    value = _value(bare, rows)
    if math.isnan(value):
        return bare
    samples = resample([bare])[0]
    low, high, left_out = percentiles(samples)
    if high - low < 1e-9:
        low, high = _wilson(value, n) if metric == "f1" else (math.nan, math.nan)
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
    tally = Counter(zip(*map(_rows, scores), strict=True))
    patterns = sorted(tally, key=repr)
    n = scores[0].n
    shares = [tally[pattern] / n for pattern in patterns]
    statistics = [
        _statistic(one, rows) for one, rows in zip(scores, zip(*patterns, strict=True), strict=True)
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


def _rows(score: Score) -> list[tuple[Any, ...]]:
    """Return what the metric sees of each row: (credit,) or (gold, value).

    Rows that count alike look alike, so that they are sorted alike: numbers are floats, 0.0 has
    no sign.
    """
    if score.metric in ("spearman", "pearson"):
        return [(_number(p, p.gold), _number(p, p.value)) for p in score.predictions]
    if score.metric == "f1" and score.labels:
        for p in score.predictions:
            if p.gold not in score.labels:
                raise UsageError(
                    f"Row {p.id!r} has the answer {p.gold!r}, which is no label of its task "
                    f"({', '.join(score.labels)}). Add it to the labels."
                )
        return [(p.gold, p.value) for p in score.predictions]
    credits_ = []
    for p in score.predictions:
        if p.credit is None or (score.metric == "accuracy" and p.credit not in (0, 1)):
            needed = "0 or 1" if score.metric == "accuracy" else "a number from 0 to 1"
            raise UsageError(
                f"Row {p.id!r} has the credit {p.credit}, and {score.metric} needs {needed}. "
                "Choose a metric that goes with the task's matcher."
            )
        credits_.append((float(p.credit),))
    return credits_


def _number(prediction: Prediction, value: str | float | None) -> float | None:
    try:
        return None if value is None else float(value) + 0.0  # −0.0 becomes 0.0
    except ValueError:
        raise UsageError(
            f"Row {prediction.id!r} has {value!r} where a correlation needs a number. "
            "Choose accuracy or f1, or mend the row."
        ) from None


def _value(score: Score, rows: Sequence[tuple[Any, ...]]) -> float:
    """Return the metric of all rows, as SciPy and scikit-learn compute it."""
    if score.metric in ("spearman", "pearson"):
        return _correlation(rows, ranked=score.metric == "spearman")
    if score.labels:
        from sklearn.metrics import f1_score  # noqa: PLC0415

        present = sorted({gold for gold, _ in rows})
        codes = {label: code for code, label in enumerate(present)}
        gold = [codes[answer] for answer, _ in rows]
        read = [codes.get(answer, -1) for _, answer in rows]
        return float(f1_score(gold, read, labels=range(len(present)), average="macro"))
    return fmean(credit for (credit,) in rows)


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


Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From (resamples, patterns), how often each pattern of a row was drawn, to (resamples,)."""


def _statistic(score: Score, rows: Sequence[tuple[Any, ...]]) -> Statistic:
    """Return the metric as a function of how often each of the rows was drawn."""
    if score.metric in ("spearman", "pearson"):
        gold, answers, read = _numbers(rows)
        ranked = score.metric == "spearman"
        return lambda counts: _counted_correlation(gold, answers, read, counts, ranked=ranked)
    if score.metric == "f1" and score.labels:
        return lambda counts: _counted_f1(rows, counts)
    credits_ = np.array([credit for (credit,) in rows], np.float64)
    return lambda counts: counts @ credits_ / counts.sum(axis=1)


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
