"""Scores with their uncertainty: accuracy, F1, correlations, and metrics of plug-ins."""

from starmerge_models.evaluation.scoring.metrics.accuracy import Accuracy
from starmerge_models.evaluation.scoring.metrics.correlation import Correlation
from starmerge_models.evaluation.scoring.metrics.custom import metric as metric
from starmerge_models.evaluation.scoring.metrics.f1 import F1
from starmerge_models.evaluation.scoring.metrics.metric import RESAMPLES as RESAMPLES
from starmerge_models.evaluation.scoring.metrics.metric import Metric as Metric
from starmerge_models.evaluation.scoring.metrics.metric import Prediction as Prediction
from starmerge_models.evaluation.scoring.metrics.metric import Reader as Reader
from starmerge_models.evaluation.scoring.metrics.metric import Score as Score
from starmerge_models.evaluation.scoring.metrics.metric import percentiles as percentiles
from starmerge_models.evaluation.scoring.metrics.metric import resample as resample
from starmerge_models.evaluation.scoring.metrics.registry import DEFAULT as DEFAULT
from starmerge_models.evaluation.scoring.metrics.registry import METRICS as METRICS
from starmerge_models.evaluation.scoring.metrics.registry import score as score

METRICS.add("accuracy", Accuracy())
METRICS.add("f1", F1())
METRICS.add("spearman", Correlation("spearman", ranked=True))
METRICS.add("pearson", Correlation("pearson", ranked=False))
