"""Accuracy: the share of right answers, Wilson's interval, McNemar's test."""

from __future__ import annotations

from starmerge_models.evaluation.scoring.metrics.means import Credits, wilson
from starmerge_models.evaluation.scoring.metrics.metric import Prediction, Reader, Score


class Accuracy(Credits):
    """The share of right answers."""

    name = "accuracy"

    def check(self, matcher: Reader | None, *, closed: bool) -> None:
        """Refuse a matcher with fractional credits."""
        if matcher is not None and matcher.is_graded:
            raise ValueError(
                f"match {matcher.name!r} needs metric 'f1', the mean of the rows' credits"
            )

    def credit(self, prediction: Prediction) -> float:
        """Return 1 for a right answer and 0 for a wrong one."""
        if prediction.credit not in (0, 1):
            raise self.unusable(prediction, "0 or 1")
        return float(prediction.credit)

    def interval(self, score: Score) -> tuple[float, float, int]:
        """Return Wilson's interval, which needs no resamples."""
        return *wilson(score.value, score.n), 0

    def paired_test(self, first: Score, second: Score) -> tuple[float, str]:
        """Return the p-value of McNemar's exact test."""
        from scipy.stats import binomtest  # noqa: PLC0415

        pairs = zip(first.predictions, second.predictions, strict=True)
        gains = [a.credit == 1 for a, b in pairs if a.credit != b.credit]
        p_value = float(binomtest(sum(gains), len(gains)).pvalue) if gains else 1.0
        return p_value, "McNemar, exact"
