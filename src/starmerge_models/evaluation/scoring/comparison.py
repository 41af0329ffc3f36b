"""Comparing models that answered the same rows: normalised averages and paired differences."""

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
"""A p-value from here on is no clear difference."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    """NaN, like ``high``, where no resample has a value."""
    high: float
    left_out: int = 0
    """Resamples without a value, left out of the interval."""


@dataclass(frozen=True)
class Difference:
    """First − second of two models on the same rows."""

    value: float
    """NaN where one of the two scores is."""
    low: float
    """Lower end of the 95 % interval, a paired bootstrap of the rows."""
    high: float
    p_value: float
    """Two-sided; how likely such a difference is between models that are equally good."""
    test: str
    """What the p-value comes from, and what it is corrected for."""
    n: int
    """Rows that were compared, over all tasks."""
    left_out: int = 0
    """Resamples without a value, left out of the interval."""

    @property
    def clear(self) -> bool:
        """Whether the rows can tell the two apart: the interval is off 0 and p < 0.05."""
        return (self.low > 0 or self.high < 0) and self.p_value < LEVEL


def normalised_average(merged: Mapping[str, Score], tuned: Mapping[str, Score]) -> Interval | None:
    """Return the mean over tasks of merged/fine-tuned score (arXiv 2502.10339).

    Whatever the task's metric. A merged model without a value (NaN, the correlation of a constant
    answer) counts as 0: it has learnt nothing of the task. A negative correlation stays negative.

    Args:
        merged: The merged model's (or the base's) score by task.
        tuned: The score of each task's own fine-tune: the upper bound.

    Returns:
        The value, with a percentile interval from resampling the rows of each task, the same rows
        for both models. It covers the choice of rows, not that of tasks. None when a task lacks a
        fine-tune, or a fine-tune's value is not positive (or NaN). Resamples in which a
        fine-tune's value is not positive are left out and counted. Where all rows are alike the
        interval has no width, which says nothing of other rows.

    Raises:
        UsageError: The two answered different rows of a task; names the first.
    """
    value = mean_ratio(merged, tuned)
    if value is None:
        return None
    return Interval(value, *percentiles(_resampled_ratios([merged], tuned)[0]))


def difference(
    first: Mapping[str, Score], second: Mapping[str, Score], tuned: Mapping[str, Score]
) -> Difference | None:
    """Return first − second of two normalised averages, paired.

    The rows are resampled for both models and the fine-tunes at once, which takes the rows' common
    noise away. The p-value is the bootstrap's (see :func:`paired`).

    Returns:
        None where either average is undefined, or the two have different tasks.

    Raises:
        UsageError: The models answered different rows of a task; names the first.
    """
    value = _gain(first, second, tuned)
    if value is None:
        return None
    a, b = _resampled_ratios([first, second], tuned)
    n = sum(score.n for score in first.values())
    return _bootstrapped(value, a - b, n, _all_differing(first, second))


def is_behind(
    first: Mapping[str, Score],
    second: Mapping[str, Score],
    tuned: Mapping[str, Score],
    *,
    level: float,
) -> bool:
    """Tell whether the first of two normalised averages is clearly below the second, paired.

    For levels so low that a count of resamples cannot tell them, as many comparisons need. The
    p-value, two-sided, is that of the difference over its bootstrap standard error, by the normal
    distribution; but never below 2^(1 − d), where d rows were answered differently. Resampling n
    rows gives a variance that is (n − 1)/n of the true one: it is corrected for the task with the
    fewest rows.

    Args:
        first: A model's score by task.
        second: Another's.
        tuned: The score of each task's own fine-tune.
        level: The p-value at which the difference is clear.

    Returns:
        False, too, where either average is undefined.

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


def perfect(score: Score) -> Score:
    """Return the score of right answers to the same rows.

    As the fine-tune of a task that has none: the normalised average then is the mean score.
    """
    right = [replace(p, response=p.gold, value=p.gold, credit=1.0) for p in score.predictions]
    return replace(score, value=1.0, predictions=tuple(right))


def paired(first: Score, second: Score) -> Difference:
    """Return first − second of two models' scores on one task, row against row.

    The interval is a paired bootstrap of the rows (percentiles). Where no row tells the models
    apart it is the point 0: it speaks of these rows and is no proof that the models are alike.

    The p-value of accuracies is McNemar's, exact: of the rows that one model alone has right, the
    share that is the first's, against one half (binomial). Of other metrics it is the bootstrap's:
    twice the share of resamples on the rarer side of 0, where 1 is added to both counts, so that it
    is never below 0.001; nor below 2^(1 − d), where d rows were answered differently.

    One p-value stands for one question asked beforehand. It is not corrected for the number of
    tasks or merges that were looked at: of two equally good models' 13 p-values, one falls below
    0.05 by chance up to half of the time. :func:`by_task` corrects for the tasks.

    Args:
        first: A model's score.
        second: Another model's, on the same rows; in any order, they are matched by id.

    Raises:
        UsageError: Scores of different metrics; rows that only one has, that one has twice or that
            have two right answers (the first is named).
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

    The p-values are Benjamini and Hochberg's: of the tasks called clearly different, at most one
    in twenty is expected to be so by chance. The intervals stay those of one task.

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
    """Say whether the rows can tell two models apart.

    Args:
        difference: Of the two.
        first: The first model's name.
        second: The second's.

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
    """Return first − second of two normalised averages; None where they cannot be compared."""
    a, b = mean_ratio(first, tuned), mean_ratio(second, tuned)
    return None if a is None or b is None or first.keys() != second.keys() else a - b


def _resampled_ratios(
    models: Sequence[Mapping[str, Score]], tuned: Mapping[str, Score]
) -> list[NDArray[np.float64]]:
    """Return each model's normalised average in each resample, (RESAMPLES,) a model."""
    generator = np.random.default_rng(0)
    by_model: list[list[NDArray[np.float64]]] = [[] for _ in models]
    for task in models[0]:
        scores = [_aligned(scores[task], tuned[task]) for scores in models]
        ceiling, *values = resample([tuned[task], *scores], generator)
        ceiling[~(ceiling > 0)] = np.nan  # there is no ratio in such a resample: it is left out
        for ratios, value in zip(by_model, values, strict=True):
            ratios.append(np.nan_to_num(value, nan=0) / ceiling)
    return [np.mean(ratios, axis=0) for ratios in by_model]


def _bootstrapped(value: float, samples: NDArray[np.float64], n: int, differing: int) -> Difference:
    """Return a difference with the interval and the p-value of its resamples.

    Args:
        value: The difference.
        samples: In each resample.
        n: Rows.
        differing: Those that the two models answered differently. If each of them were as likely
            to be the other way around, all would fall one way with 2^(1 − differing): the p-value
            is never below, however few rows the resamples repeat.
    """
    low, high, left_out = percentiles(samples)
    beyond = 1 + min((samples <= 0).sum(), (samples >= 0).sum())
    p_value = min(1.0, max(2 * beyond / (1 + samples.size - left_out), 2.0 ** (1 - differing)))
    return Difference(value, low, high, float(p_value), "paired bootstrap", n, left_out)


def _all_differing(first: Mapping[str, Score], second: Mapping[str, Score]) -> int:
    """Return how many rows of all tasks two models answered differently."""
    return sum(_differing(first[task], second[task]) for task in first)


def _differing(first: Score, second: Score) -> int:
    """Return how many rows two models answered differently; rows in one order or not."""
    answers = _answers(first)
    return sum(answers.get(row) != answer for row, answer in _answers(second).items())


def _answers(score: Score) -> dict[str, tuple[Any, ...]]:
    """Return what was read in the response to each row, what it earned and what the metric sees."""
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
