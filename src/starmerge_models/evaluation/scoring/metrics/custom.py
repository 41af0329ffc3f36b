"""Custom metrics: decorated functions of one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.scoring.metrics.means import Credits
from starmerge_models.evaluation.scoring.metrics.metric import Metric, Prediction, Score, Statistic
from starmerge_models.evaluation.scoring.metrics.registry import METRICS


def metric(
    name: str, of: Callable[[NDArray[np.float64]], float] | None = None
) -> Callable[[Callable[[Prediction], Any]], Metric]:
    """Make the decorated function of one row a metric called ``name``.

    Without ``of`` the function returns the row's credit, from 0 to 1, and the score is the mean.
    With ``of`` the function returns a fixed number of numbers; they are summed over the rows, and
    ``of`` computes the score from the sums. So a metric need not be a mean over rows: BLEU, for
    example, is computed from sums of n-gram counts.

    The score of perfect answers should be 1, and higher should be better. The function gets the
    whole :class:`Prediction`: the response, the answer that the task's matcher parsed, and the
    right answer.

    Args:
        name: The metric's name in tables and task files.
        of: From the sums, (k,) float64, to the score; NaN if it is undefined.

    Raises:
        UsageError: The name is taken.

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


class _RowMean(Credits):
    """The mean of a user's function over the rows."""

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
    """A user's function of sums over the rows; another function returns each row's numbers."""

    has_row_credits = False

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


def _numbers_of(
    metric: Metric, function: Callable[[Prediction], Any], prediction: Prediction
) -> tuple[float, ...]:
    """Call a plug-in's function on a row and return its one or more numbers.

    Raises:
        StarmergeError: The function raises, or returns no finite numbers; the message has the row.
    """
    try:
        returned = function(prediction)
        is_one = isinstance(returned, str) or not isinstance(returned, Iterable)
        numbers = [returned] if is_one else list(returned)
    except Exception as error:  # whatever the plug-in's own code raises
        raise StarmergeError(
            f"The metric {metric.name!r} failed at row {prediction.id!r}: "
            f"{type(error).__name__}: {error}."
        ) from error
    are_numbers = all(isinstance(n, SupportsFloat) and math.isfinite(n) for n in numbers)
    if not numbers or not are_numbers:
        raise StarmergeError(
            f"The metric {metric.name!r} returns {returned!r} for row {prediction.id!r}. It must "
            "return finite numbers."
        )
    return tuple(float(number) + 0.0 for number in numbers)  # −0.0 becomes 0.0
