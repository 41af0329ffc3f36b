"""The registry of metrics, and the score of predictions by a metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.metrics.metric import Metric, Prediction, Score
from starmerge_models.plugins import Registry

DEFAULT = "accuracy"
"""The default metric of a task; tables omit its name."""


def _fault(thing: Any) -> str | None:
    """Return why an object is not a usable metric; None if it is one."""
    if isinstance(thing, Metric):
        return None
    if callable(thing):
        return 'it is not decorated. Write @metric("name") above the function of one row'
    return f"it is of the type {type(thing).__name__}, and a metric is a function of one row"


METRICS: Registry[Metric] = Registry("metric", "starmerge_models.metrics", fault=_fault)
"""Every metric by name; other packages and files can add metrics."""


def score(
    predictions: Sequence[Prediction], metric: str | Metric, labels: Sequence[str] = ()
) -> Score:
    """Summarise the predictions of one model for one task.

    accuracy
        The share of right answers; an unreadable answer is wrong. The interval is Wilson's.
    f1, with labels
        The mean over the labels of their F1 (macro-F1). An unreadable answer is a false negative of
        its gold label and a prediction of no label. A label that is no row's gold answer has no F1
        and is not part of the mean: otherwise perfect answers would not have the score 1.
    f1, without labels
        The mean of the rows' credits, their token F1.
    spearman, pearson
        The correlation of the parsed numbers with the gold ones. An unreadable answer is replaced
        by the mean of the readable ones (of their ranks, for Spearman, so that the scale of the
        answers does not matter). If a share u is unreadable at random, this multiplies the
        correlation by √(1 − u). It is NaN if fewer than 3 answers are readable, or all readable
        answers or all gold numbers are equal.
    another name
        A plug-in's metric: the mean of its function over the rows, or a function of sums over the
        rows; see :func:`starmerge_models.evaluation.scoring.metrics.metric`.

    The interval of F1 and of correlations is the percentile interval of :data:`RESAMPLES` bootstrap
    resamples of the rows, with a fixed seed. It is a percentile interval, since comparisons of two
    models use the same and it allows for resamples without a value, which are ignored and counted.
    If all resamples are equal (every answer right), they give no information on other rows: a mean
    and F1 then have Wilson's interval at their value, other metrics none (NaN).

    Args:
        predictions: One prediction for each row.
        metric: A metric, or its name in :data:`METRICS`.
        labels: The labels of a task with a closed set, as in ``gold`` and ``value``.

    Raises:
        UsageError: There are no predictions, the metric is unknown, or it cannot use a row; the
            message has the row's id.
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
