"""Comparison of models on the same rows: normalised averages and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.metrics import Score, percentiles, resample

LEVEL = 0.05
"""Significance level: a p-value of at least this is no clear difference."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    """NaN, like ``high``, if no resample has a value."""
    high: float
    left_out: int = 0
    """Number of resamples without a value, which the interval ignores."""


@dataclass(frozen=True)
class Difference:
    """First − second of two models on the same rows."""

    value: float
    """NaN if one of the two scores is."""
    low: float
    """Lower end of the 95 % interval, a paired bootstrap of the rows."""
    high: float
    p_value: float
    """Two-sided: the probability of a difference at least as large between equally good models."""
    test: str
    """The test that gave the p-value, and the correction applied to it."""
    n: int
    """Number of compared rows, over all tasks."""
    left_out: int = 0
    """Number of resamples without a value, which the interval ignores."""

    @property
    def clear(self) -> bool:
        """Whether the difference is significant: the interval excludes 0 and p < 0.05."""
        return (self.low > 0 or self.high < 0) and self.p_value < LEVEL


def normalised_average(merged: Mapping[str, Score], tuned: Mapping[str, Score]) -> Interval | None:
    """Return the mean over tasks of merged/fine-tuned score (arXiv 2502.10339).

    It is defined for every metric. A merged model's NaN (the correlation of a constant answer)
    counts as 0. A negative correlation stays negative.

    Args:
        merged: The merged model's (or the base's) score by task.
        tuned: The score of each task's own fine-tune: the upper bound.

    Returns:
        The value, with a percentile interval from resampling the rows of each task, the same rows
        for both models. The interval covers the choice of rows, not of tasks. None if a task has no
        fine-tune, or a fine-tune's value is not positive (or NaN). Resamples in which a fine-tune's
        value is not positive are ignored and counted. If all rows have the same score the interval
        has no width, which says nothing about other rows.

    Raises:
        UsageError: The models answered different rows of a task; the message names the first.
    """
    value = mean_ratio(merged, tuned)
    if value is None:
        return None
    return Interval(value, *percentiles(_resampled_ratios([merged], tuned)[0]))


def difference(
    first: Mapping[str, Score], second: Mapping[str, Score], tuned: Mapping[str, Score]
) -> Difference | None:
    """Return first − second of two normalised averages, paired.

    Each resample draws the same rows for both models and the fine-tunes, which removes the noise
    that the rows have in common. The p-value is the bootstrap's (see :func:`paired`).

    Returns:
        None if either average is undefined, or the models have different tasks.

    Raises:
        UsageError: The models answered different rows of a task; the message names the first.
    """
    value = _gain(first, second, tuned)
    if value is None:
        return None
    a, b = _resampled_ratios([first, second], tuned)
    n = sum(score.n for score in first.values())
    return _bootstrapped(value, a - b, n, _all_differing(first, second))


def is_clearly_worse(
    first: Mapping[str, Score],
    second: Mapping[str, Score],
    tuned: Mapping[str, Score],
    *,
    level: float,
) -> bool:
    """Return whether the first of two normalised averages is significantly lower, paired by rows.

    For significance levels too low for the number of resamples, as many comparisons need. The
    two-sided p-value is a z-test of the difference over its bootstrap standard error, but never
    below 2^(1 − d), where d is the number of rows answered differently. Resampling n rows gives a
    variance that is (n − 1)/n of the true one; the standard error is corrected for this with the n
    of the task with the fewest rows.

    Args:
        first: A model's score by task.
        second: Another's.
        tuned: The score of each task's own fine-tune.
        level: The significance level.

    Returns:
        Also False if either average is undefined.

    Raises:
        UsageError: As :func:`difference`.
    """
    from scipy.stats import norm  # noqa: PLC0415

    value = _gain(first, second, tuned)
    fewest = min((score.n for score in first.values()), default=0)
    if value is None or value >= 0 or fewest < 2:
        return False
    if 2.0 ** (1 - _all_differing(first, second)) > level:
        return False
    a, b = _resampled_ratios([first, second], tuned)
    error = float(np.nanstd(a - b)) * math.sqrt(fewest / (fewest - 1))
    return bool(2 * norm.cdf(value / error) <= level) if error > 0 else True


def perfect_score(score: Score) -> Score:
    """Return the score of a model that answers all of these rows correctly.

    It replaces the fine-tune of a task that has none, so that the normalised average is the mean
    score.
    """
    right = [replace(p, response=p.gold, value=p.gold, credit=1.0) for p in score.predictions]
    return replace(score, value=1.0, predictions=tuple(right))


def paired(first: Score, second: Score) -> Difference:
    """Return first − second of two models' scores on one task, paired by rows.

    The interval is a paired bootstrap of the rows (percentiles). If the models agree on every row
    it is [0, 0], which does not show that the models are equal on other rows.

    The p-value of accuracies is McNemar's exact test: of the rows that only one model has right,
    the share that the first has right, against one half (binomial). For other metrics it is the
    bootstrap's: twice the share of resamples on the rarer side of 0, with 1 added to both counts,
    so that it is never below 0.001; nor below 2^(1 − d), where d is the number of rows answered
    differently.

    The p-value is valid for a single comparison planned in advance. It is not corrected for the
    number of tasks or merges: of two equally good models' 13 p-values, one is below 0.05 by chance
    up to half of the time. :func:`by_task` corrects for the number of tasks.

    Args:
        first: A model's score.
        second: Another model's score on the same rows, in any order; rows are matched by id.

    Raises:
        UsageError: The scores have different metrics, a row is in only one of them or twice in
            one, or has two right answers; the message names the first such row.
    """
    second = _aligned(second, first)
    value = first.value - second.value
    if math.isnan(value):
        return Difference(value, math.nan, math.nan, math.nan, "none", first.n)
    a, b = resample([first, second])
    result = _bootstrapped(value, a - b, first.n, _differing(first, second))
    own = first.computed_by.paired_test(first, second)
    return result if own is None else replace(result, p_value=own[0], test=own[1])


def by_task(first: Mapping[str, Score], second: Mapping[str, Score]) -> dict[str, Difference]:
    """Return the paired difference of each task that both models have, corrected for their number.

    The p-values are adjusted by Benjamini and Hochberg's procedure: of the tasks with a clear
    difference, at most one in twenty is expected to be a false positive. The intervals are not
    adjusted.

    Raises:
        UsageError: As :func:`paired`.
    """
    from scipy.stats import false_discovery_control  # noqa: PLC0415

    results = {task: paired(first[task], second[task]) for task in first if task in second}
    tested = [task for task, result in results.items() if not math.isnan(result.p_value)]
    if len(tested) < 2:
        return results
    corrected = false_discovery_control([results[task].p_value for task in tested])
    for task, p_value in zip(tested, corrected, strict=True):
        test = f"{results[task].test}; Benjamini-Hochberg over {len(tested)} tasks"
        results[task] = replace(results[task], p_value=float(p_value), test=test)
    return results


def in_words(difference: Difference, first: str, second: str) -> str:
    """Describe the difference of two models in a sentence.

    Args:
        difference: First − second.
        first: The first model's name.
        second: The second model's name.

    Returns:
        A sentence with the difference, its interval, the p-value and the verdict: which model is
        better, or "no clear difference".
    """
    if math.isnan(difference.value):
        return f"{first} − {second}: not comparable, a score is undefined."
    verdict = "no clear difference"
    if difference.clear:
        verdict = f"{first if difference.value > 0 else second} is better"
    return (
        f"{first} − {second}: {difference.value:+.3f}, paired 95 % interval "
        f"[{difference.low:+.3f}, {difference.high:+.3f}], p = {difference.p_value:.2g} "
        f"({difference.test}; n = {difference.n}): {verdict}."
    )


def mean_ratio(merged: Mapping[str, Score], tuned: Mapping[str, Score]) -> float | None:
    """Return a normalised average without its interval; see :func:`normalised_average`."""
    if not merged or not all(task in tuned and tuned[task].value > 0 for task in merged):
        return None
    values = {task: 0 if math.isnan(s.value) else s.value for task, s in merged.items()}
    return float(np.mean([values[task] / tuned[task].value for task in merged]))


def _gain(
    first: Mapping[str, Score], second: Mapping[str, Score], tuned: Mapping[str, Score]
) -> float | None:
    """Return first − second of two normalised averages; None if they cannot be compared."""
    a, b = mean_ratio(first, tuned), mean_ratio(second, tuned)
    return None if a is None or b is None or first.keys() != second.keys() else a - b


def _resampled_ratios(
    models: Sequence[Mapping[str, Score]], tuned: Mapping[str, Score]
) -> list[NDArray[np.float64]]:
    """Return each model's normalised average in each resample, an array (RESAMPLES,) per model."""
    generator = np.random.default_rng(0)
    by_model: list[list[NDArray[np.float64]]] = [[] for _ in models]
    for task in models[0]:
        scores = [_aligned(scores[task], tuned[task]) for scores in models]
        ceiling, *values = resample([tuned[task], *scores], generator)
        ceiling[~(ceiling > 0)] = np.nan  # the ratio is undefined: the resample is ignored
        for ratios, value in zip(by_model, values, strict=True):
            ratios.append(np.nan_to_num(value, nan=0) / ceiling)
    return [np.mean(ratios, axis=0) for ratios in by_model]


def _bootstrapped(value: float, samples: NDArray[np.float64], n: int, differing: int) -> Difference:
    """Return a difference with the interval and the p-value of its resamples.

    Args:
        value: The difference.
        samples: The difference in each resample.
        n: Number of rows.
        differing: Number of rows that the two models answered differently. If each were equally
            likely to favour either model, all would favour the same one with probability
            2^(1 − differing), so the p-value is never below that.
    """
    low, high, left_out = percentiles(samples)
    beyond = 1 + min((samples <= 0).sum(), (samples >= 0).sum())
    p_value = min(1.0, max(2 * beyond / (1 + samples.size - left_out), 2.0 ** (1 - differing)))
    return Difference(value, low, high, float(p_value), "paired bootstrap", n, left_out)


def _all_differing(first: Mapping[str, Score], second: Mapping[str, Score]) -> int:
    """Return how many rows of all tasks two models answered differently."""
    return sum(_differing(first[task], second[task]) for task in first)


def _differing(first: Score, second: Score) -> int:
    """Return how many rows two models answered differently; the rows may be in any order."""
    answers = _answers(first)
    return sum(answers.get(row) != answer for row, answer in _answers(second).items())


def _answers(score: Score) -> dict[str, tuple[Any, ...]]:
    """Return the parsed answer to each row, its credit and the metric's view of the row, by id."""
    seen = score.computed_by.rows(score)
    return {p.id: (p.value, p.credit, row) for p, row in zip(score.predictions, seen, strict=True)}


def _aligned(score: Score, other: Score) -> Score:
    """Return a score with its rows in the order of another's."""
    if score.metric != other.metric:
        raise UsageError(
            f"A score is {score.metric}, the other {other.metric}. Compare scores of one task file."
        )
    rows = {prediction.id: prediction for prediction in score.predictions}
    ids = [prediction.id for prediction in other.predictions]
    for own, theirs in ((score, set(ids)), (other, rows.keys())):
        seen: set[str] = set()
        for prediction in own.predictions:
            if prediction.id not in theirs or prediction.id in seen:
                fault = "twice" if prediction.id in seen else "in one score but not in the other"
                raise UsageError(
                    f"Row {prediction.id!r} is {fault}. Compare scores of the same rows: the same "
                    "task, sample and seed."
                )
            seen.add(prediction.id)
    for prediction in other.predictions:
        if rows[prediction.id].gold != prediction.gold:
            raise UsageError(
                f"Row {prediction.id!r} has the right answers {rows[prediction.id].gold!r} and "
                f"{prediction.gold!r}. Compare scores of the same task."
            )
    return replace(score, predictions=tuple(rows[row] for row in ids))
