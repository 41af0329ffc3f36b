"""Normalised averages of the runs of a store, with intervals and comparisons.

A run's normalised average is the mean over its tasks of its score divided by the score of the
task's fine-tune (arXiv 2502.10339); if several merged models have the same task, by the mean of
their scores. A 95 % interval is a bootstrap over the rows of each task: all runs of a store
answered the same rows, and each resample draws the same rows for all of them. So it covers the
choice of the rows, not of the models; the single combinations show the variation over models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.comparison import Difference, Interval
from starmerge_models.evaluation.scoring.metrics import METRICS, RESAMPLES, Score, percentiles
from starmerge_models.study.runs import label_of
from starmerge_models.study.store import Record, Store

if TYPE_CHECKING:
    import pandas as pd

Samples = NDArray[np.float64]
"""A value for each resample, (RESAMPLES,); NaN if undefined."""

SPLITS = 100
"""Number of random splits of the rows of each task into two halves."""


@dataclass(frozen=True)
class RunAverage:
    """The normalised average of one run."""

    record: Record
    value: float
    samples: Samples
    base: float
    """The base's normalised average on the same tasks."""
    base_samples: Samples
    halves: NDArray[np.float64]
    """The value on both halves of each split of the rows, (2, SPLITS); NaN if undefined."""

    @cached_property
    def label(self) -> str:
        """The chain with its non-default parameters."""
        return self.record.run.label

    @property
    def n(self) -> int:
        """Number of merged models."""
        return len(self.record.run.models)


class Averages:
    """The normalised averages of the merges of a store.

    A merge is in :attr:`left_out` if a task has no fine-tune with a score above 0.

    Args:
        store: The store.

    Raises:
        UsageError: The store has no run of the base, or no merge for which every task has a
            fine-tune with a score above 0.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        records = [record for record in store.records if record.error is None]
        bases = [record for record in records if record.run.kind == "base"]
        if not bases:
            raise UsageError(f"{store.folder} has no scores of the base yet. Go on with the study.")
        self._base = bases[0]
        self._tuned = {r.run.models[0]: r for r in records if r.run.kind == "fine-tune"}
        self._counts: dict[int, NDArray[np.float64]] = {}
        self._known: dict[tuple[str, str], NDArray[np.float64]] = {}
        merges = [record for record in records if record.run.kind == "merge"]
        found = [self._average(record) for record in merges]
        self.runs = tuple(average for average in found if average is not None)
        self.left_out = tuple(
            record for record, average in zip(merges, found, strict=True) if average is None
        )
        """Merges with a task without a fine-tune that has a score above 0."""
        if not merges:
            raise UsageError(f"{store.folder} has no merge yet. Go on with the study.")
        if not self.runs:
            raise UsageError(
                f"{store.folder} has {len(merges)} merges, and none all of whose tasks have a "
                f"fine-tune with a score above 0. {_lacking(self.without_fine_tune)}"
            )

    @cached_property
    def without_fine_tune(self) -> tuple[str, ...]:
        """The tasks without a fine-tune that has a score above 0."""
        return tuple(t for t in self.store.head["tasks"] if not self.tuned_score(t) > 0)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The merges' chains with their parameters, in the order of execution."""
        return tuple(dict.fromkeys(run.label for run in self.runs))

    def mean(self, runs: Sequence[RunAverage]) -> Interval:
        """Return the mean of some runs' normalised averages, with its interval."""
        value = float(np.mean([run.value for run in runs]))
        return Interval(value, *percentiles(np.mean([run.samples for run in runs], axis=0)))

    def base_mean(self, runs: Sequence[RunAverage]) -> Interval:
        """Return the mean of the base's normalised averages on the tasks of some runs."""
        value = float(np.mean([run.base for run in runs]))
        return Interval(value, *percentiles(np.mean([run.base_samples for run in runs], axis=0)))

    def difference(self, first: Sequence[RunAverage], second: Sequence[RunAverage]) -> Difference:
        """Return the paired difference of two means, first − second.

        The p-value is the bootstrap's, as in ``comparison.paired``: never below 2^(1 − d), where d
        is the number of rows that any two paired runs answered differently.

        Args:
            first: Runs of one chain.
            second: Runs of another. Combinations that only one of the two has are ignored.

        Raises:
            UsageError: They have no combination in common.
        """
        ours, theirs = _by_models(first), _by_models(second)
        common = [models for models in ours if models in theirs]
        if not common:
            raise UsageError("The two have no combination of models in common.")
        value = float(np.mean([_value(ours[models]) - _value(theirs[models]) for models in common]))
        gaps = [_sample(ours[models]) - _sample(theirs[models]) for models in common]
        samples = np.mean(gaps, axis=0)
        low, high, left_out = percentiles(samples)
        beyond = 1 + min((samples <= 0).sum(), (samples >= 0).sum())
        rows, differing = _rows([(ours[models], theirs[models]) for models in common])
        least = 2.0 ** (1 - differing)
        p_value = min(1.0, max(2 * beyond / (1 + samples.size - left_out), least))
        return Difference(value, low, high, float(p_value), "paired bootstrap", rows, left_out)

    def base_score(self, task: str) -> float:
        """Return the base's score on a task; NaN if undefined."""
        return float(self._values(self._base, task)[0])

    def tuned_score(self, task: str) -> float:
        """Return the mean score of a task's fine-tunes on it; NaN if there is none."""
        own = [record for record in self._tuned.values() if task in record.by_task]
        scores = [self._values(record, task)[0] for record in own]
        return float(np.mean(scores)) if scores else math.nan

    def to_frame(self, without: Sequence[str] = ()) -> pd.DataFrame:
        """Return a row for each chain and number of models.

        Its columns are ``label``, ``method``, ``parameters`` (a dict), ``n``, ``combinations``,
        ``value``, ``low``, ``high``, ``base``, ``base_low`` and ``base_high``.

        Args:
            without: Parameters to omit from the label, as they are on an axis.
        """
        import pandas as pd  # noqa: PLC0415

        groups: dict[tuple[str, int], list[RunAverage]] = {}
        for run in self.runs:
            groups.setdefault((run.label, run.n), []).append(run)
        rows = []
        for (_, n), runs in groups.items():
            own, base = self.mean(runs), self.base_mean(runs)
            first = runs[0].record.run
            rows.append(
                {
                    "label": label_of(first.method, first.parameters, without),
                    "method": first.method,
                    "parameters": dict(first.parameters),
                    "n": n,
                    "combinations": len({run.record.run.models for run in runs}),
                    **_flat("", own),
                    **_flat("base", base),
                }
            )
        return pd.DataFrame(rows)

    def runs_to_frame(self, without: Sequence[str] = ()) -> pd.DataFrame:
        """Return a row for each run.

        Its columns are ``label``, ``method``, ``parameters``, ``n``, ``combination``, ``models``,
        ``value``, ``low``, ``high`` and ``base``.

        Args:
            without: Parameters to omit from the label, as they are on an axis.
        """
        import pandas as pd  # noqa: PLC0415

        rows = []
        for average in self.runs:
            run = average.record.run
            rows.append(
                {
                    "label": label_of(run.method, run.parameters, without),
                    "method": run.method,
                    "parameters": dict(run.parameters),
                    "n": average.n,
                    "combination": run.combination,
                    "models": list(run.models),
                    **_flat("", self.mean([average])),
                    "base": average.base,
                }
            )
        return pd.DataFrame(rows)

    def _average(self, record: Record) -> RunAverage | None:
        """Return the normalised average of a merge; None if a task has no fine-tune above 0."""
        ratios, below = [], []
        for task in record.by_task:
            ceiling = self._ceiling(record, task)
            if not ceiling[0] > 0:
                return None
            ceiling = np.where(ceiling > 0, ceiling, np.nan)
            ratios.append(np.nan_to_num(self._values(record, task)) / ceiling)
            below.append(np.nan_to_num(self._values(self._base, task)) / ceiling)
        own, base = np.mean(ratios, axis=0), np.mean(below, axis=0)
        halves, samples = np.split(own[1:], [2 * SPLITS])
        return RunAverage(
            record,
            float(own[0]),
            samples,
            float(base[0]),
            base[1 + 2 * SPLITS :],
            halves.reshape(2, SPLITS),
        )

    def share(self, run: RunAverage, task: str) -> float:
        """Return a merge's score on a task as a share of the fine-tunes'; NaN if undefined.

        If the merge has several fine-tunes of the task, the mean of their scores counts.
        """
        score = self._values(run.record, task)[0]
        return float(score / self._ceiling(run.record, task)[0])

    def base_share(self, run: RunAverage, task: str) -> float:
        """Return the base's score on a task as a share of the fine-tunes' in a merge."""
        return float(self._values(self._base, task)[0] / self._ceiling(run.record, task)[0])

    def _ceiling(self, record: Record, task: str) -> NDArray[np.float64]:
        """Return the mean score on a task of the merged fine-tunes; (1,) zeros without any."""
        tuned = [
            self._values(self._tuned[model], task)
            for model in record.run.models
            if model in self._tuned and task in self._tuned[model].by_task
        ]
        return np.asarray(np.mean(tuned, axis=0)) if tuned else np.zeros(1)

    def _values(self, record: Record, task: str) -> NDArray[np.float64]:
        """Return a run's score on a task, for each row of :meth:`_row_counts`."""
        key = (record.run.key, task)
        if key not in self._known:
            line = record.by_task[task]
            rows = [tuple(seen) if isinstance(seen, list) else (seen,) for seen in line["seen"]]
            metric = METRICS.find(line["metric"])
            statistic = metric.statistic(_bare_score(line, rows), rows)
            self._known[key] = np.asarray(statistic(self._row_counts(task, len(rows))), np.float64)
        return self._known[key]

    def _row_counts(self, task: str, rows: int) -> NDArray[np.float64]:
        """Return the counts of each row of a task, (1 + 2 · SPLITS + RESAMPLES, rows).

        The first row of the array counts every row once; the next 2 · SPLITS count the rows of the
        first, then of the second half of each split once; the others count the draws of a resample.
        """
        place = list(self.store.head["tasks"]).index(task)
        if place not in self._counts:
            generator = np.random.default_rng([0, place])
            drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
            is_first = np.tile(np.arange(rows) % 2 == 0, (SPLITS, 1))
            is_first = np.random.default_rng([1, place]).permuted(is_first, axis=1)
            counts = np.vstack([np.ones(rows), is_first, ~is_first, drawn])
            self._counts[place] = counts.astype(np.float64)
        return self._counts[place]


def _bare_score(line: Mapping[str, Any], rows: Sequence[tuple[Any, ...]]) -> Score:
    """Return a score without predictions, for a metric that gets its rows from a store's line.

    The labels of a task with a closed set are those that occur in its rows: for a metric of credits
    a row is one number, for a metric of labels the right answer and the parsed one.
    """
    metric = METRICS.find(line["metric"])
    labels = tuple(sorted({str(row[0]) for row in rows})) if len(rows[0]) == 2 else ()
    return Score(
        metric=metric.name,
        computed_by=metric,
        value=math.nan if line["score"] is None else line["score"],
        low=math.nan,
        high=math.nan,
        n=line["rows"],
        unparsed=line["unparsed"],
        shortened=line["shortened"],
        predictions=(),
        labels=labels,
    )


def _by_models(runs: Sequence[RunAverage]) -> dict[tuple[str, ...], list[RunAverage]]:
    """Return runs by the merged models; several runs differ in the seed."""
    found: dict[tuple[str, ...], list[RunAverage]] = {}
    for run in runs:
        found.setdefault(run.record.run.models, []).append(run)
    return found


def _rows(pairs: Sequence[tuple[Sequence[RunAverage], Sequence[RunAverage]]]) -> tuple[int, int]:
    """Return the number of rows of paired runs, and how many of them any pair answered differently.

    A row counts once, even if its task is in several combinations.
    """
    sizes: dict[str, int] = {}
    differing: set[tuple[str, int]] = set()
    for first, second in pairs:
        for ours, theirs in product(first, second):
            for task, line in ours.record.by_task.items():
                sizes[task] = line["rows"]
                seen = zip(line["seen"], theirs.record.by_task[task]["seen"], strict=True)
                differing |= {(task, row) for row, (a, b) in enumerate(seen) if a != b}
    return sum(sizes.values()), len(differing)


def _value(runs: Sequence[RunAverage]) -> float:
    return float(np.mean([run.value for run in runs]))


def _sample(runs: Sequence[RunAverage]) -> Samples:
    return np.asarray(np.mean([run.samples for run in runs], axis=0))


def _lacking(tasks: Sequence[str]) -> str:
    """Return a sentence on the tasks that lack a fine-tune to divide by."""
    return (
        f"Without one: {', '.join(tasks) or 'none'}. Continue the study if these fine-tunes are "
        "not evaluated yet; otherwise remove the tasks from it."
    )


def _flat(name: str, interval: Interval) -> dict[str, float]:
    keys = (name or "value", f"{name}_low".lstrip("_"), f"{name}_high".lstrip("_"))
    return dict(zip(keys, (interval.value, interval.low, interval.high), strict=True))
