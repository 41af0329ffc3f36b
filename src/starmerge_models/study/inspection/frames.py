"""DataFrames for the figures and pages of an inspection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starmerge_models.study.inspection.inspection import Inspection
from starmerge_models.study.inspection.tensor_measures import LISTED

if TYPE_CHECKING:
    import pandas as pd

MOST_MODELS = 12
"""For more models, maps and spectra show the mean over all models."""

NO_LAYER = "–"
"""Layer name of tensors outside of layers."""


@dataclass(frozen=True)
class Measure:
    """A measure of ordered pairs of models, shown as a matrix."""

    title: str
    name: str
    """Short name of the measure."""
    row_key: str
    """Key of a pair's record with the number for row a and column b."""
    column_key: str
    """Key of a pair's record with the number for row b and column a."""
    about: str
    is_diverging: bool = False
    """Whether the colour scale is centred at zero."""


MEASURES = (
    Measure(
        "Cosine of the task vectors", "cosine", "cosine", "cosine",
        "1: the same direction, −1: opposite, 0: nothing in common.", is_diverging=True,
    ),
    Measure(
        "Row's answer to the column's inputs", "answer", "a_on_b", "b_on_a",
        "How strongly the row's update answers to the column's inputs, over the column's own "
        "answer.",
    ),
    Measure(
        "Overlap of inputs", "overlap", "overlap_in", "overlap_in",
        "1: both read the same input directions, each as strongly.",
    ),
    Measure(
        "Overlap of outputs", "overlap", "overlap_out", "overlap_out",
        "1: both write the same output directions, each as strongly.",
    ),
    Measure(
        "Row acting on the column's subspace", "share", "a_acting_on_b", "b_acting_on_a",
        "The share of the row's energy on the input directions that STAR keeps of the column.",
    ),
    Measure(
        "Sign conflict", "conflict", "sign_conflict", "sign_conflict",
        "The share of Σ|τ_a τ_b| where signs differ; ½ for independent signs.",
    ),
)  # fmt: skip


def matrices_of(inspection: Inspection) -> pd.DataFrame:
    """Return the tensors that have a spectrum and are not vectors."""
    frame = inspection.to_frame("tensors")
    frame = frame[frame["kept"].notna()]
    frame = frame[frame["shape"].str.contains("×")]
    return frame.assign(layer=_named_layers(frame))


def rank_maps(inspection: Inspection) -> pd.DataFrame:
    """Return the mean rank that STAR keeps, by ``model``, ``layer`` and ``module``, as ``kept``.

    All three are ordered categories, layers ascending. More than :data:`MOST_MODELS` models are
    replaced by their mean.
    """
    frame = _averaged_models(inspection, matrices_of(inspection))
    means = frame.groupby(["model", "layer", "module"], as_index=False)["kept"].mean()
    orders = {
        "model": _models(frame["model"], inspection),
        "layer": _layers(frame),
        "module": list(dict.fromkeys(frame["module"])),
    }
    return _ordered(means, orders)


def conflict_map(inspection: Inspection) -> pd.DataFrame:
    """Return the table of layers with a defined conflict, with layers and modules as categories."""
    frame = inspection.to_frame("layers")
    frame = frame[frame["conflict"].notna()]
    frame = frame.assign(layer=_named_layers(frame))
    modules = list(dict.fromkeys(frame["module"]))
    return _ordered(frame, {"layer": _layers(frame), "module": modules})


def spectra_by_module(inspection: Inspection) -> pd.DataFrame:
    """Return the mean share of the nuclear norm in the first singular values.

    Columns ``module``, ``model`` (ordered categories), ``index`` from 0 and ``share`` from 0 to 1;
    the mean is over the matrices of a module. After the end of a spectrum its share is constant.
    More than :data:`MOST_MODELS` models are replaced by their mean.
    """
    import pandas as pd  # noqa: PLC0415  (slow to import)

    known = matrices_of(inspection)
    frame = inspection.to_frame("spectra")
    frame = frame[
        frame["cumulative"].notna()
        & frame["tensor"].isin(known["tensor"])
        & (frame["index"] <= LISTED)
    ]
    frame = frame.assign(curve=frame["tensor"] + "\n" + frame["model"])
    frame = _averaged_models(inspection, frame)
    modules = list(dict.fromkeys(known["module"]))
    found = []
    for module in modules:
        for model in _models(frame["model"], inspection):
            own = frame[(frame["module"] == module) & (frame["model"] == model)]
            if len(own):
                by_tensor = own.pivot(index="index", columns="curve", values="cumulative")
                curve = by_tensor.ffill().mean(axis=1)
                found.append(
                    pd.DataFrame(
                        {
                            "module": module,
                            "model": model,
                            "index": [0, *curve.index],
                            "share": [0.0, *curve],
                        }
                    )
                )
    orders = {"module": modules, "model": _models(frame["model"], inspection)}
    return _ordered(pd.concat(found, ignore_index=True), orders)


def conflict_matrix(inspection: Inspection, measure: Measure) -> pd.DataFrame:
    """Return a measure of all pairs: ``row`` and ``column`` (models), ``value``; no diagonal."""
    import pandas as pd  # noqa: PLC0415

    rows = []
    for pair in inspection.conflicts:
        a, b = pair["a"], pair["b"]
        rows += [(a, b, pair[measure.row_key]), (b, a, pair[measure.column_key])]
    frame = pd.DataFrame(rows, columns=["row", "column", "value"]).astype({"value": float})
    return _ordered(frame, {"row": inspection.names, "column": inspection.names})


def kept(inspection: Inspection) -> pd.DataFrame:
    """Return the table "kept" without undefined rows."""
    frame = inspection.to_frame("kept")
    return frame[frame["own"].notna()] if len(frame) else frame


def has_spectra(inspection: Inspection) -> bool:
    """Return whether there is a rank map to draw."""
    return any(record["kept"] and "×" in record["shape"] for record in inspection.tensors)


def has_conflicts(inspection: Inspection) -> bool:
    """Return whether two models change the same matrix."""
    return any(record["a_on_b"] is not None for record in inspection.conflicts)


def _layers(frame: pd.DataFrame) -> list[str]:
    """Return the names of a frame's layers, ascending."""
    return sorted(set(frame["layer"]), key=lambda name: -1 if name == NO_LAYER else int(name))


def _named_layers(frame: pd.DataFrame) -> list[str]:
    return [
        NO_LAYER if layer is None or math.isnan(layer) else str(int(layer))
        for layer in frame["layer"]
    ]


def _averaged_models(inspection: Inspection, frame: pd.DataFrame) -> pd.DataFrame:
    """Replace the models of a frame by a single mean model if there are too many."""
    count = len(inspection.models)
    return frame.assign(model=f"mean of {count} models") if count > MOST_MODELS else frame


def _models(values: pd.Series[str], inspection: Inspection) -> list[str]:
    present = set(values)
    return [name for name in inspection.names if name in present] or sorted(present)


def _ordered(frame: pd.DataFrame, orders: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Sort the rows by columns of names, converted to ordered categories."""
    import pandas as pd  # noqa: PLC0415

    sorts = {
        column: pd.Categorical(frame[column], categories=list(order), ordered=True)
        for column, order in orders.items()
    }
    return frame.assign(**sorts).sort_values(list(orders), ignore_index=True, kind="stable")
