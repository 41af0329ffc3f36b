"""Figures of an inspection: rank map, spectra, conflicts, retention by merges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from starmerge_models.study.figures.cells import draw_cells
from starmerge_models.study.figures.style import (
    FAINT,
    SIZE,
    SMALL,
    TUNED_LINE,
    add_legend,
    dot_of,
    fit_labels,
    label_rows,
    line_of,
    new_figure,
    save,
    styled,
)
from starmerge_models.study.inspection import frames
from starmerge_models.study.inspection.inspection import Inspection
from starmerge_models.study.palette import plot_styles

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

Plot: TypeAlias = Callable[[Inspection, Path], Figure]

_MOST_WRITTEN = 16
"""Matrices of more models have no numbers in their cells."""

_LEVEL_LINE: dict[str, Any] = {
    "color": FAINT,
    "linewidth": 0.8,
    "linestyle": (0, (4, 3)),
    "zorder": 1.5,
}


def plots_of(inspection: Inspection) -> dict[str, Plot]:
    """Return the figures that have data, by name."""
    found: dict[str, Plot] = {}
    if frames.has_spectra(inspection):
        found |= {"ranks": plot_ranks, "spectra": plot_spectra}
    if frames.has_conflicts(inspection):
        found["conflicts"] = plot_conflicts
    if len(frames.kept(inspection)):
        found["kept"] = plot_kept
    return found


def plot_ranks(inspection: Inspection, path: Path) -> Figure:
    """Draw the rank that STAR keeps, by layer and module: the paper's Figure 3, a panel per model.

    Args:
        inspection: An inspection with at least one changed matrix.
        path: Figure to write; see :func:`starmerge_models.study.figures.style.save`.
    """
    frame = frames.rank_maps(inspection)
    names, layers, modules = (_categories(frame, key) for key in ("model", "layer", "module"))
    rows, columns = _panels(len(names))
    width = 1.3 + columns * max(0.5 + 0.3 * len(modules), 1.5)
    height = 0.9 + rows * (0.35 + 0.12 * max(6, len(layers)))
    limits = float(frame["kept"].min()), float(frame["kept"].max())
    with styled():
        figure = new_figure(
            max(4.5, width),
            height,
            _title(inspection, f"Rank that STAR keeps at η = {inspection.eta:g}"),
        )
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        step = math.ceil(len(layers) / 16)
        for axes, name in zip(grid.flat, names, strict=False):
            cells = _cells(
                frame[frame["model"] == name], "layer", layers, "module", modules, "kept"
            )
            image = draw_cells(axes, cells, layers, modules, limits=limits, has_numbers=False)
            axes.set_yticks(range(0, len(layers), step), layers[::step], fontsize=SMALL)
            _name_panel(axes, name, width / columns - 0.3)
        _clear(grid, len(names))
        figure.supylabel("layer", fontsize=SIZE, color=FAINT)
        bar = figure.colorbar(
            image, ax=grid, shrink=0.7, pad=0.02, aspect=30, ticks=MaxNLocator(6, integer=True)
        )
        bar.outline.set_visible(False)
        bar.set_label("rank kept, mean")
    return save(figure, path)


def plot_spectra(inspection: Inspection, path: Path) -> Figure:
    """Draw the share of the nuclear norm in the first singular values: a panel for each module.

    Each line is a model's mean over the layers. STAR keeps the singular values up to η, the dashed
    line.

    Args:
        inspection: An inspection with at least one changed matrix.
        path: Figure to write; see :func:`starmerge_models.study.figures.style.save`.
    """
    frame = frames.spectra_by_module(inspection)
    modules, names = _categories(frame, "module"), _categories(frame, "model")
    shown = plot_styles(names)
    rows, columns = _panels(len(modules))
    with styled():
        figure = new_figure(
            max(5.0, 0.8 + 2.1 * columns), 0.6 + 1.9 * rows + 0.17 * math.ceil(len(names) / 4),
            _title(inspection, "Share of the nuclear norm in the first singular values"),
        )  # fmt: skip
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes, module in zip(grid.flat, modules, strict=False):
            for name in names:
                own = frame[(frame["module"] == module) & (frame["model"] == name)]
                if len(own):
                    line = line_of(shown[name]) | {"markevery": max(1, len(own) // 16)}
                    axes.plot(own["index"], 100 * own["share"], **line, ms=3, lw=1)
            axes.axhline(inspection.eta, **_LEVEL_LINE)
            axes.set_ylim(0, 102)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_xlabel("singular values")
            _name_panel(axes, module, 1.8)
        for axes in grid[:, 0]:
            axes.set_ylabel("share, %")
        _clear(grid, len(modules))
        handles = [Line2D([], [], **line_of(style), ms=3, lw=1) for style in shown.values()]
        level = Line2D([], [], **_LEVEL_LINE)
        add_legend(figure, [*handles, level], [*names, f"η = {inspection.eta:g}"])
    return save(figure, path)


def plot_conflicts(inspection: Inspection, path: Path) -> Figure:
    """Draw the conflicts of pairs of models: a matrix for each of the six measures.

    Args:
        inspection: An inspection with at least two models that change the same matrix.
        path: Figure to write; see :func:`starmerge_models.study.figures.style.save`.
    """
    names = inspection.names
    count = len(names)
    side = max(2.6, min(7.0, 0.4 * count))
    with styled():
        figure = new_figure(
            2 * side + 3.4, 3 * (side * 0.72 + 0.45) + 1.0,
            _title(inspection, "What pairs of models do to each other"),
        )  # fmt: skip
        grid = figure.subplots(3, 2, squeeze=False, sharex=True, sharey=True)
        for axes, measure in zip(grid.flat, frames.MEASURES, strict=True):
            matrix = frames.conflict_matrix(inspection, measure)
            cells = _cells(matrix, "row", names, "column", names, "value")
            image = draw_cells(
                axes,
                cells,
                names,
                names,
                is_diverging=measure.is_diverging,
                has_numbers=count <= _MOST_WRITTEN,
            )
            bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02, ticks=MaxNLocator(4))
            bar.outline.set_visible(False)
            axes.set_title(measure.title, loc="left", fontsize=SIZE)
    return save(figure, path)


def plot_kept(inspection: Inspection, path: Path) -> Figure:
    """Draw how much of each task merges keep on the task's inputs, and their other response there.

    Args:
        inspection: An inspection with at least one merge.
        path: Figure to write; see :func:`starmerge_models.study.figures.style.save`.
    """
    frame = frames.kept(inspection)
    names = [name for name in inspection.names if name in set(frame["model"])]
    merges = list(dict.fromkeys(frame["merge"].tolist()))
    shown = plot_styles(merges)
    with styled():
        figure = new_figure(
            8.0, 1.1 + len(names) * (0.16 + 0.09 * max(2, len(merges))),
            _title(inspection, "What merges keep of each task, on its own inputs"),
        )  # fmt: skip
        own_axes, others_axes = figure.subplots(1, 2, sharey=True)
        for axes, column in ((own_axes, "own"), (others_axes, "others")):
            for number, merge in enumerate(merges):
                mine = frame[frame["merge"] == merge].set_index("model")[column].reindex(names)
                shift = 0.6 * ((number + 0.5) / len(merges) - 0.5)
                axes.plot(mine, np.arange(len(names)) + shift, **dot_of(shown[merge]))
            label_rows(axes, names)
            most = max(float(frame[column].max()), 1.0 if column == "own" else 0.1)
            axes.set_xlim(min(0.0, float(frame[column].min())) - 0.04 * most, 1.05 * most)
        own_axes.axvline(1, **TUNED_LINE)
        own_axes.set_xlabel("of the task itself (1: all)")
        others_axes.set_xlabel("something else, over the task's own answer")
        others_axes.tick_params(labelleft=False)
        handles = [Line2D([], [], **dot_of(style)) for style in shown.values()]
        add_legend(figure, handles, merges)
    return save(figure, path)


def _title(inspection: Inspection, about: str) -> str:
    count = len(inspection.models)
    return f"{about}: {count} model{'s' if count > 1 else ''} of {inspection.base}"


def _categories(frame: pd.DataFrame, column: str) -> list[str]:
    """Return the categories of a column in order."""
    return [str(name) for name in frame[column].cat.categories]


def _cells(
    frame: pd.DataFrame,
    row: str,
    rows: Sequence[str],
    column: str,
    columns: Sequence[str],
    value: str,
) -> NDArray[np.float64]:
    """Return a matrix of the values by the names of rows and columns; NaN for missing ones."""
    table = frame.pivot(index=row, columns=column, values=value)
    cells: NDArray[np.float64] = table.reindex(index=rows, columns=columns).to_numpy(np.float64)
    return cells


def _panels(count: int) -> tuple[int, int]:
    """Return the number of rows and columns of a grid of panels."""
    columns = 3 if count in (5, 6, 9) else min(count, 4)
    return math.ceil(count / columns), columns


def _name_panel(axes: Axes, name: str, width: float) -> None:
    """Put a name above a panel with a width in inches."""
    (short,) = fit_labels([name], 72 * width, SIZE)
    axes.set_title(short, loc="left")


def _clear(grid: NDArray[np.object_], count: int) -> None:
    """Hide the panels after the first ``count``; the panels above them get tick labels."""
    columns = grid.shape[1]
    for place, axes in enumerate(grid.flat):
        if place >= count:
            axes.set_axis_off()
        elif place + columns >= count:
            axes.tick_params(labelbottom=True)
