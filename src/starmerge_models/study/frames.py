"""DataFrames for the figures and pages of a study."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from starmerge_models.evaluation.model_groups import BASE
from starmerge_models.methods.pipeline import make_pipeline
from starmerge_models.study.averages import Averages
from starmerge_models.study.grids import best_parameters

if TYPE_CHECKING:
    import pandas as pd


def by_number(
    averages: Averages, methods: Collection[str] | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the averages and the runs of some chains; see :mod:`.figures.curves`.

    Args:
        averages: The averages.
        methods: The chains; None: all.
    """
    return _of(averages.to_frame(), methods), _of(averages.runs_to_frame(), methods)


def by_parameter(
    averages: Averages, parameter: str, methods: Collection[str] | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the averages and the runs of chains with a parameter, labels without the parameter.

    Args:
        averages: The averages.
        parameter: Its name, without the step's name: ``p`` for ``dare.p``.
        methods: The chains; None: all.
    """
    found = []
    for frame in (averages.to_frame([parameter]), averages.runs_to_frame([parameter])):
        own = _of(frame, methods)
        has_it = [parameter in _short(parameters) for parameters in own.parameters]
        own = own[has_it].reset_index(drop=True)
        found.append(own.assign(parameters=[_short(parameters) for parameters in own.parameters]))
    return found[0], found[1]


def best_by_number(
    averages: Averages, parameter: str, methods: Collection[str] | None
) -> pd.DataFrame:
    """Return a parameter's best value by chain and number; see :func:`best_parameters`."""
    frame = best_parameters(averages, parameter)
    return frame if methods is None else frame[frame.label.isin(methods)]


def one_shot(
    averages: Averages, methods: Collection[str] | None
) -> tuple[pd.DataFrame, dict[str, Mapping[str, Any]]]:
    """Return the averages under the names of their chains, and the default parameters of each."""
    frame = _of(averages.to_frame(), methods)
    defaults: dict[str, Mapping[str, Any]] = {}
    for method, own in frame.groupby("method", sort=False):
        name = str(method)
        is_grid = len(own) > own.n.nunique()
        defaults[name] = make_pipeline(name).parameters() if is_grid else own.parameters.iloc[0]
    return frame.assign(label=frame.method), defaults


def shares_by_task(averages: Averages, methods: Collection[str] | None) -> pd.DataFrame:
    """Return the scores of the merges with the most models as shares of the fine-tunes' scores.

    Columns ``task``, ``label`` and ``share``; the base is first.
    """
    import pandas as pd  # noqa: PLC0415

    most = max(run.n for run in averages.runs)
    rows: dict[tuple[str, str], list[float]] = {}
    for run in averages.runs:
        if run.n == most and (methods is None or run.record.run.method in methods):
            for task in run.record.by_task:
                rows.setdefault((BASE, task), []).append(averages.base_share(run, task))
                rows.setdefault((run.label, task), []).append(averages.share(run, task))
    return pd.DataFrame(
        [
            {"task": task, "label": label, "share": sum(shares) / len(shares)}
            for (label, task), shares in sorted(rows.items(), key=lambda row: row[0][0] != BASE)
        ],
        columns=["task", "label", "share"],
    )


def _of(frame: pd.DataFrame, methods: Collection[str] | None) -> pd.DataFrame:
    return frame if methods is None else frame[frame.method.isin(methods)].reset_index(drop=True)


def _short(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters by their names without the step's name, if these are unique."""
    names = [key.rpartition(".")[2] for key in parameters]
    return {
        key.rpartition(".")[2]: value
        for key, value in parameters.items()
        if names.count(key.rpartition(".")[2]) == 1
    }
