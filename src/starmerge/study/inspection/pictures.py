"""Pictures of an inspection: rank map, spectra, conflicts, what merges keep.

Each function takes an :class:`starmerge.study.inspection.inspection.Inspection` and a file, whose
suffix gives the format. Colours are those of viridis and cividis, which the colour-blind can tell
apart and which stay in order when printed grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from starmerge.study.inspection.inspection import Inspection
from starmerge.study.inspection.look import LISTED

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Grid: TypeAlias = npt.NDArray[np.float64]
Plot: TypeAlias = Callable[[Inspection, Path], None]

_MOST_PANELS = 12
"""Of more models, the rank map shows the mean over all."""
_MOST_WRITTEN = 16
"""Of more models, the numbers in a matrix are left to its colours."""
_NO_LAYER = -1
"""Stands for tensors outside of layers, above the first."""
_NAME = 22
"""Characters of a name that are shown."""


def all_pictures(inspection: Inspection) -> dict[str, Plot]:
    """Return the pictures that there is something to draw for, by name."""
    found: dict[str, Plot] = {}
    if any(record["kept"] for record in inspection.tensors):
        found |= {"ranks": plot_ranks, "spectra": plot_spectra}
    if any(record["a_on_b"] is not None for record in inspection.conflicts):
        found["conflicts"] = plot_conflicts
    if any(record["own"] is not None for record in inspection.kept):
        found["kept"] = plot_kept
    return found


def plot_ranks(inspection: Inspection, path: Path) -> None:
    """Draw the rank that STAR keeps, by layer and module: the paper's Figure 3, a panel a model."""
    import matplotlib.pyplot as plt  # noqa: PLC0415  (slow to import)
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    frame = _matrices(inspection)
    names = inspection.names
    labels = _axes_of(frame)
    grids = {name: _grid(frame[frame["model"] == name], *labels) for name in names}
    if len(names) > _MOST_PANELS:
        grids = {f"mean of {len(names)} models": _grid(frame, *labels)}
    rows, columns = _panels(len(grids))
    width = 1.1 + columns * (0.75 + 0.34 * len(labels[1]))
    height = 1.3 + rows * (0.6 + 0.13 * max(6, len(labels[0])))
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(4.0, width), height), squeeze=False, layout="constrained"
    )
    known = np.concatenate([grid[~np.isnan(grid)] for grid in grids.values()])
    image = None
    for axis, (name, grid) in zip(axes.flat, grids.items(), strict=False):
        image = axis.imshow(grid, vmin=known.min(), vmax=known.max(), cmap="viridis", aspect="auto")
        _label(axis, *labels)
        axis.set_title(_short(name), fontsize=9, loc="left")
    for axis in axes.flat[len(grids) :]:
        axis.set_visible(False)
    figure.supylabel("layer", fontsize=9)
    assert image is not None, "there is a model"
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, aspect=30)
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    bar.ax.tick_params(labelsize=7)
    bar.set_label(f"rank kept by STAR, η = {inspection.eta:g}", fontsize=9)
    _save(figure, path)


def plot_spectra(inspection: Inspection, path: Path) -> None:
    """Draw the share of the nuclear norm in each singular value, a panel a module, a line a model.

    Lines are means over the layers. STAR keeps what lies left of η.
    """
    import matplotlib.pyplot as plt  # noqa: PLC0415

    frame = inspection.to_frame("spectra")
    frame = frame[frame["cumulative"].notna()]
    matrices = _matrices(inspection)
    frame = frame[frame["module"].isin(matrices["module"])]
    modules = _ordered(matrices["module"])
    rows, columns = _panels(len(modules))
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1.2 + 2.5 * columns, 1.0 + 2.0 * rows),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    names = inspection.names
    colours = plt.colormaps["viridis"](np.linspace(0, 0.92, len(names)))
    for axis, module in zip(axes.flat, modules, strict=False):
        own = frame[frame["module"] == module]
        for name, colour in zip(names, colours, strict=True):
            mine = own[(own["model"] == name) & (own["index"] <= LISTED)]
            if len(mine):
                # A spectrum that has ended holds all of its nuclear norm from there on.
                by_tensor = mine.pivot(index="index", columns="tensor", values="cumulative")
                curve = 100 * by_tensor.ffill().mean(axis=1)
                x, y = [0, *curve.index.tolist()], [0.0, *curve.tolist()]
                axis.plot(x, y, color=colour, linewidth=1.2, label=_short(name))
        axis.axhline(inspection.eta, color="#666666", linewidth=0.7, linestyle=(0, (4, 3)))
        axis.set_title(module, fontsize=9, loc="left")
        axis.set_ylim(0, 102)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(modules) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("singular values", fontsize=8)
    figure.supylabel("share of the nuclear norm, %", fontsize=9)
    lines = {
        label: line
        for axis in axes.flat
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if len(lines) <= _MOST_WRITTEN:
        ordered = [name for name in map(_short, names) if name in lines]
        figure.legend(
            [lines[name] for name in ordered],
            ordered,
            loc="outside lower center",
            ncols=min(len(lines), max(2, 2 * columns)),
            frameon=False,
            fontsize=8,
        )
    _save(figure, path)


def plot_conflicts(inspection: Inspection, path: Path) -> None:
    """Draw pairs of models: cosines, overlaps of inputs and outputs, and answers to each other.

    The last matrix is over the column's own answer.
    """
    import matplotlib.pyplot as plt  # noqa: PLC0415

    names = inspection.names
    place = {name: number for number, name in enumerate(names)}
    matrices: dict[str, Grid] = {
        title: np.full((len(names), len(names)), np.nan)
        for title in (
            "cosine",
            "overlap of inputs",
            "overlap of outputs",
            "row's answer to the column's inputs",
        )
    }
    for pair in inspection.conflicts:
        i, j = place[pair["a"]], place[pair["b"]]
        values = (
            (pair["cosine"], pair["cosine"]),
            (pair["overlap_in"], pair["overlap_in"]),
            (pair["overlap_out"], pair["overlap_out"]),
            (pair["a_on_b"], pair["b_on_a"]),
        )
        for matrix, (one, other) in zip(matrices.values(), values, strict=True):
            matrix[i, j] = np.nan if one is None else one
            matrix[j, i] = np.nan if other is None else other
    side = 1.0 + min(6.0, 0.42 * len(names)) + 0.06 * max(map(len, map(_short, names)))
    figure, axes = plt.subplots(
        2, 2, figsize=(2 * side + 1.2, 2 * side), squeeze=False, layout="constrained"
    )
    for axis, (title, matrix) in zip(axes.flat, matrices.items(), strict=True):
        _matrix(axis, matrix, names, title)
    _save(figure, path)


def plot_kept(inspection: Inspection, path: Path) -> None:
    """Draw what merges keep of each task on its own inputs, beside what else they do there."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    frame = inspection.to_frame("kept")
    frame = frame[frame["own"].notna()]
    names = [name for name in inspection.names if name in set(frame["model"])]
    merges = _ordered(frame["merge"])
    colours = plt.colormaps["viridis"](np.linspace(0.05, 0.85, len(merges)))
    figure, axes = plt.subplots(
        1,
        2,
        figsize=(8.0, 1.5 + 0.24 * len(names) + 0.12 * len(merges)),
        sharey=True,
        layout="constrained",
    )
    titles = {
        "own": "on its own inputs: of the task itself (1: all)",
        "others": "and something else, over its own answer",
    }
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for number, (merge, colour) in enumerate(zip(merges, colours, strict=True)):
            own = frame[frame["merge"] == merge].set_index("model")[column].reindex(names)
            offset = 0.5 * (number - (len(merges) - 1) / 2) / max(1, len(merges))
            y = np.arange(len(names)) + offset
            marker = "osD^vPX"[number % 7]
            axis.plot(own, y, marker, markersize=5, color=colour, label=_short(merge))
        axis.axvline(0, color="#aaaaaa", linewidth=0.7)
        if column == "own":
            axis.axvline(1, color="#666666", linewidth=0.7, linestyle=(0, (4, 3)))
        axis.set_xlim(min(0.0, float(frame[column].min())) - 0.05, None)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), [_short(name) for name in names])
    axes[0].invert_yaxis()
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(merges)),
        frameon=False,
        fontsize=8,
    )
    _save(figure, path)


def _matrices(inspection: Inspection) -> pd.DataFrame:
    """Return the tensors with a spectrum of more than one value, which vectors lack."""
    frame = inspection.to_frame("tensors")
    frame = frame[frame["kept"].notna()]
    return frame[frame["shape"].str.contains("×")]


def _axes_of(frame: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return the labels of a map's rows and columns: layers, and modules."""
    layers = sorted({_NO_LAYER if math.isnan(layer) else int(layer) for layer in frame["layer"]})
    return ["–" if layer == _NO_LAYER else str(layer) for layer in layers], _ordered(
        frame["module"]
    )


def _grid(frame: pd.DataFrame, layers: Sequence[str], modules: Sequence[str]) -> Grid:
    """Return the mean kept rank by layer and module, NaN where there is none."""
    rows = {layer: number for number, layer in enumerate(layers)}
    columns = {module: number for number, module in enumerate(modules)}
    totals, counts = np.zeros((2, len(layers), len(modules)))
    for layer, module, kept in zip(frame["layer"], frame["module"], frame["kept"], strict=True):
        place = rows["–" if math.isnan(layer) else str(int(layer))], columns[module]
        totals[place] += kept
        counts[place] += 1
    grid: Grid = np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
    return grid


def _ordered(values: pd.Series[str]) -> list[str]:
    """Return each value once, in the order of the model."""
    return list(dict.fromkeys(values.tolist()))


def _panels(count: int) -> tuple[int, int]:
    """Return rows and columns that hold some panels."""
    columns = min(count, 4) if count != 9 else 3
    return math.ceil(count / columns), columns


def _label(axis: Axes, layers: Sequence[str], modules: Sequence[str]) -> None:
    step = max(1, math.ceil(len(layers) / 16))
    axis.set_yticks(range(0, len(layers), step), layers[::step], fontsize=7)
    axis.set_xticks(
        range(len(modules)), modules, rotation=45, ha="right", rotation_mode="anchor", fontsize=7
    )
    axis.tick_params(length=2)


def _matrix(axis: Axes, matrix: Grid, names: Sequence[str], title: str) -> None:
    """Draw one matrix of models by models with its own colours; the diagonal stays empty."""
    known = matrix[~np.isnan(matrix)]
    low = min(0.0, float(known.min())) if len(known) else 0.0
    high = max(float(known.max()), low + 1e-9) if len(known) else 1.0
    image = axis.imshow(matrix, vmin=low, vmax=high, cmap="cividis")
    shown = [_short(name) for name in names]
    axis.set_xticks(
        range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor", fontsize=7
    )
    axis.set_yticks(range(len(names)), shown, fontsize=7)
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=9, loc="left")
    axis.spines[:].set_visible(False)
    if len(names) <= _MOST_WRITTEN:
        for (i, j), value in np.ndenumerate(matrix):
            if not math.isnan(value):
                dark = value < (low + high) / 2
                axis.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if dark else "black",
                )
    axis.figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02).ax.tick_params(labelsize=7)


def _short(name: str) -> str:
    """Return the beginning of a name, as matplotlib writes it: between two $ it reads formulas."""
    shown = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
    return shown.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure.savefig(path, dpi=150)
    plt.close(figure)
