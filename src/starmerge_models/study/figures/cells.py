"""Matrices of coloured cells: heat maps, conflict matrices, maps of layers and modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.image import AxesImage

from starmerge_models.study.figures.style import SMALL, fit_labels, label_rows
from starmerge_models.study.palette import DIVERGING, SEQUENTIAL

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIVERGING = LinearSegmentedColormap.from_list("diverging", DIVERGING)


def draw_cells(
    axes: Axes,
    cells: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limits: tuple[float, float] | None = None,
    is_diverging: bool = False,
    has_numbers: bool = True,
) -> AxesImage:
    """Draw a matrix with the names of its rows and columns.

    Args:
        axes: The axes to draw on.
        cells: The numbers, (rows, columns); NaN is an empty cell.
        rows: Names of the rows, the first on top.
        columns: Names of the columns.
        limits: The numbers at the ends of the colour scale; None: the smallest and the largest.
        is_diverging: Whether the colour scale is centred at zero.
        has_numbers: Whether to write the numbers into the cells.

    Returns:
        The image, for a colour bar.
    """
    known = cells[~np.isnan(cells)]
    low, high = limits or ((known.min(), known.max()) if len(known) else (0.0, 1.0))
    if is_diverging:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    colours: Colormap | str = _DIVERGING if is_diverging else SEQUENTIAL
    image = axes.imshow(
        cells, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    label_rows(axes, rows)
    axes.set_xticks(
        range(len(columns)),
        fit_labels(columns, 72 * 1.4, SMALL),
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    if has_numbers:
        for (row, column), number in np.ndenumerate(cells):
            if not math.isnan(number):
                red, green, blue, _ = image.to_rgba(number)
                is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                axes.text(
                    column,
                    row,
                    f"{number:.2f}",
                    ha="center",
                    va="center",
                    size=7,
                    color="white" if is_dark else "black",
                )
    return image
