"""Scores with their uncertainty: accuracy, normalised average, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from starmerge.evaluation.scoring import Answer

RESAMPLES = 2000
"""Bootstrap resamples behind an interval of a normalised average."""


@dataclass(frozen=True)
class Score:
    """The accuracy of one model on one task."""

    value: float
    """Share of right answers, 0 to 1."""
    n: int
    low: float
    """Lower end of the 95 % Wilson interval."""
    high: float
    unparsed: float
    """Share of responses from which no answer could be read; they count as wrong."""
    right: tuple[bool, ...]
    """Row by row, for paired comparisons."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def accuracy(answers: Sequence[Answer]) -> Score:
    """Summarise the answers of one model to one task; the interval is Wilson's."""
    from scipy.stats import binomtest  # noqa: PLC0415  (0.5 s that only a score needs)

    right = tuple(answer.right for answer in answers)
    n = len(right)
    interval = binomtest(sum(right), n).proportion_ci(0.95, method="wilson")
    unparsed = sum(not answer.parsed for answer in answers) / n
    return Score(sum(right) / n, n, interval.low, interval.high, unparsed, right)


def normalised_average(merged: Mapping[str, Score], tuned: Mapping[str, Score]) -> Interval | None:
    """Return the mean over tasks of merged/fine-tuned accuracy (arXiv 2502.10339).

    Args:
        merged: The merged model's (or the base's) score by task.
        tuned: The score of each task's own fine-tune: the upper bound.

    Returns:
        The value, with an interval from resampling the rows of each task, the same rows for
        both models. None when a task lacks a fine-tune, or a fine-tune has no right answer.
    """
    if not merged or not merged.keys() <= tuned.keys():
        return None
    if any(tuned[task].value == 0 for task in merged):
        return None
    value = float(np.mean([merged[task].value / tuned[task].value for task in merged]))
    samples = _resampled_ratios([merged], tuned)[0]
    low, high = np.nanquantile(samples, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def difference(
    first: Mapping[str, Score], second: Mapping[str, Score], tuned: Mapping[str, Score]
) -> Interval | None:
    """Return first − second of two normalised averages, with a paired 95 % interval.

    Both models answered the same rows, so the rows are resampled for both at once. None where
    either average is undefined.
    """
    averages = [normalised_average(scores, tuned) for scores in (first, second)]
    if averages[0] is None or averages[1] is None or first.keys() != second.keys():
        return None
    a, b = _resampled_ratios([first, second], tuned)
    low, high = np.nanquantile(a - b, [0.025, 0.975])
    return Interval(averages[0].value - averages[1].value, float(low), float(high))


def _resampled_ratios(
    models: Sequence[Mapping[str, Score]], tuned: Mapping[str, Score]
) -> list[NDArray[np.float64]]:
    """Return each model's normalised average in each resample, (:data:`RESAMPLES`,)."""
    rng = np.random.default_rng(0)
    totals = [np.zeros(RESAMPLES) for _ in models]
    for task in models[0]:
        n = tuned[task].n
        counts = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
        ceiling = (counts @ np.asarray(tuned[task].right)).astype(np.float64)
        ceiling[ceiling == 0] = np.nan  # there is no ratio in such a resample: it is left out
        for number, scores in enumerate(models):
            totals[number] += counts @ np.asarray(scores[task].right) / ceiling
    return [total / len(models[0]) for total in totals]
