"""The best points of parameter grids, and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from starmerge_models.evaluation.scoring.comparison import Difference, Interval
from starmerge_models.evaluation.scoring.metrics import percentiles
from starmerge_models.methods.pipeline import make_pipeline
from starmerge_models.study.averages import Averages, RunAverage

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class GridBest:
    """The best of a chain's points for a number of models, compared with the chain's defaults."""

    method: str
    n: int
    points: int
    default: Interval | None
    """The normalised average with the defaults, or of the only point of the grid; None if the
    defaults are not among the points."""
    best_label: str
    best: Interval
    """The highest normalised average, on the rows that selected it: biased upwards."""
    held_out: float
    """The normalised average, on one half of the rows, of the point that is best on the other half:
    the mean over random splits and both halves. NaN if no split has values on both halves."""
    gain: Difference | None
    """Best − default, paired; also biased upwards."""


def best_of_grids(averages: Averages) -> list[GridBest]:
    """Return the best point of each chain for each number of models."""
    found = []
    for (method, n), points in _points(averages).items():
        runs = list(points.values())
        means = [averages.mean(own) for own in runs]
        best = int(np.argmax([mean.value for mean in means]))
        usual = _default(method, points)
        found.append(
            GridBest(
                method,
                n,
                len(points),
                None if usual is None else averages.mean(usual),
                list(points)[best],
                means[best],
                _held_out(runs),
                None if usual is None else averages.difference(runs[best], usual),
            )
        )
    return found


def best_parameters(averages: Averages, parameter: str) -> pd.DataFrame:
    """Return a parameter's best value for each chain and number of models.

    The interval contains the middle 95 % of the best values in resamples of the rows: if it is
    wide, the rows do not determine the best value. Of equally good values, the middle one counts
    (the lower of two).

    Args:
        averages: The averages.
        parameter: A numeric parameter in which several points of a chain differ.

    Returns:
        Columns ``label`` (the chain), ``n``, ``best``, ``low``, ``high``, and ``value``, the
        normalised average at the best value.
    """
    import pandas as pd  # noqa: PLC0415

    rows = []
    for (method, n), points in _points(averages).items():
        places, runs = _along(points, parameter)
        if len(set(places)) < 2:
            continue
        values = np.array([averages.mean(own).value for own in runs])
        low, high, _ = percentiles(_best_places(places, _samples(runs)))
        (best,) = _best_places(places, values[:, None])
        rows.append(
            {
                "label": method,
                "n": n,
                "best": best,
                "low": low,
                "high": high,
                "value": values.max(),
            }
        )
    return pd.DataFrame(rows, columns=["label", "n", "best", "low", "high", "value"])


def shift_of_best(
    averages: Averages, parameter: str, method: str, numbers: tuple[int, int]
) -> Interval:
    """Return the change of a parameter's best value from one number of models to another.

    The interval is paired: each resample has the same rows for both numbers of models.

    Args:
        averages: The averages.
        parameter: As for :func:`best_parameters`.
        method: The chain.
        numbers: The numbers of models: from, to.

    Raises:
        KeyError: The chain has no runs of one of the numbers.
    """
    points = _points(averages)
    found = []
    for n in numbers:
        places, runs = _along(points[method, n], parameter)
        values = np.array([averages.mean(own).value for own in runs])
        found.append(_best_places(places, np.column_stack([values, _samples(runs)])))
    shift = found[1] - found[0]
    return Interval(float(shift[0]), *percentiles(shift[1:]))


def _along(
    points: dict[str, list[RunAverage]], parameter: str
) -> tuple[NDArray[np.float64], list[list[RunAverage]]]:
    """Return a parameter's values at the points of a chain, and the runs at each point."""
    runs = [own for own in points.values() if value_of(own[0], parameter) is not None]
    return np.array([value_of(own[0], parameter) for own in runs], np.float64), runs


def _samples(runs: Sequence[Sequence[RunAverage]]) -> NDArray[np.float64]:
    """Return the mean over the runs of each point, in each resample: (points, RESAMPLES)."""
    return np.array([np.mean([run.samples for run in own], axis=0) for own in runs])


def _best_places(places: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the place of the highest value in each column; NaN for a column with a NaN.

    Of equally good places the middle one counts (the lower of two).
    """
    found = np.full(values.shape[1], np.nan)
    for number, column in enumerate(values.T):
        if not np.isnan(column).any():
            best = np.sort(places[column == column.max()])
            found[number] = best[(len(best) - 1) // 2]
    return found


def value_of(run: RunAverage, parameter: str) -> float | None:
    """Return a parameter of a run's chain; None unless exactly one has the name and is a number."""
    parameters = run.record.run.parameters
    found = [v for key, v in parameters.items() if key.rpartition(".")[2] == parameter]
    is_number = len(found) == 1 and isinstance(found[0], int | float)
    return float(found[0]) if is_number and not isinstance(found[0], bool) else None


def _points(averages: Averages) -> dict[tuple[str, int], dict[str, list[RunAverage]]]:
    """Return the runs by chain and number of models, then by label.

    Only combinations that all points of the chain have are included, so that a failed or missing
    run does not lead to a comparison on different models.
    """
    found: dict[tuple[str, int], dict[str, list[RunAverage]]] = {}
    for run in averages.runs:
        points = found.setdefault((run.record.run.method, run.n), {})
        points.setdefault(run.label, []).append(run)
    compared = {}
    for key, points in found.items():
        by_point = [{run.record.run.models for run in own} for own in points.values()]
        if common := set.intersection(*by_point):
            compared[key] = {
                label: [run for run in own if run.record.run.models in common]
                for label, own in points.items()
            }
    return compared


def _default(method: str, points: dict[str, list[RunAverage]]) -> list[RunAverage] | None:
    """Return the runs with the chain's defaults, or those of the only point."""
    if len(points) == 1:
        return next(iter(points.values()))
    return points.get(make_pipeline(method).name)


def _held_out(points: Sequence[Sequence[RunAverage]]) -> float:
    """Return the mean value, on one half of the rows, of the point that is best on the other."""
    halves = np.array([np.mean([run.halves for run in own], axis=0) for own in points])
    halves = halves[:, :, ~np.isnan(halves).any(axis=(0, 1))]
    if halves.size == 0:
        return math.nan
    chosen = np.argmax(halves, axis=0)  # for each half and split
    return float(np.mean(np.take_along_axis(halves[:, ::-1], chosen[None], axis=0)))
