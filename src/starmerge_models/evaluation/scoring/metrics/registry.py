"""Every metric by its name, and the score of predictions by one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.metrics.metric import Metric, Prediction, Score
from starmerge_models.plugins import Registry

DEFAULT = "accuracy"
"""The metric of a task that names none; tables leave its name out."""


def _fault(thing: Any) -> str | None:
    """Return why something is no metric that can be used."""
    if isinstance(thing, Metric):
        return None
    if callable(thing):
        return 'it is not decorated. Write @metric("name") above the function of one row'
    return f"it is of the type {type(thing).__name__}, and a metric is a function of one row"


METRICS: Registry[Metric] = Registry("metric", "starmerge_models.metrics", fault=_fault)
"""Every metric by name; other packages and files have more."""


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
        see
        :func:`starmerge_models.evaluation.scoring.metrics.metric`.

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
