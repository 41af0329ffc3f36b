"""Plot styles of methods in all figures: colour-blind-safe colours, markers, line dashes.

The colours are those of Okabe and Ito (2008), "Color Universal Design", without black, the colour
of text, and yellow, which is too pale on white. Methods also differ in marker and dashes, so that
figures are readable in black and white.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

Marker = Literal[
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "triangle-down",
    "cross",
    "triangle-right",
    "triangle-left",
]
"""Vega's names of markers."""

COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS: tuple[Marker, ...] = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "triangle-down",
    "cross",
    "triangle-right",
    "triangle-left",
)
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (1.5, 1.5), (6, 2, 1.5, 2))
"""Lengths of strokes and gaps in line widths; empty for a line without gaps."""

BASE_COLOUR = "#8A8F94"
"""Colour of the base, which is always a dashed line."""
BASE_DASHES = (4.0, 3.0)
TUNED_COLOUR = "#4D4D4D"
"""Colour of the fine-tunes on white, which are always a solid line."""

SEQUENTIAL = "viridis"
"""Colour scale of heat maps, known to matplotlib and Vega by this name."""

DIVERGING = ("#00548A", "#66A9CF", "#F7F7F7", "#EE9F66", "#B24E00")
"""Diverging colour scale for numbers around zero, such as cosines; zero is white."""

_ORDERED = ("#5E4FA2", "#3288BD", "#2F9E8F", "#8AA82B", "#DD9A22", "#D9532C")
"""Colours from cold to warm, visible on both dark and light pages."""

_KNOWN = (
    "star",
    "average",
    "auto",
    "ties",
    "task_arithmetic",
    "tsv_m",
    "shares",
    "tall_masks",
    "metagpt",
    "covariance+own_response",
    "dare",
    "emr",
    "knots",
    "iso_c",
    "iso_cts",
    "regmean",
    "denoise+shares",
    "breadcrumbs",
)
"""Methods with a fixed style in all figures."""


@dataclass(frozen=True)
class PlotStyle:
    """The plot style of a method."""

    colour: str
    """Hexadecimal, ``#RRGGBB``."""
    marker: Marker
    dashes: tuple[float, ...]
    """Lengths of strokes and gaps in line widths; empty for a line without gaps."""


_STYLES = tuple(
    PlotStyle(COLOURS[column], MARKERS[(column + row) % len(MARKERS)], DASHES[row % len(DASHES)])
    for row in range(len(MARKERS))
    for column in range(len(COLOURS))
)
"""All styles, each with a unique colour and marker; six consecutive ones differ in colour."""


def plot_styles(labels: Iterable[str]) -> dict[str, PlotStyle]:
    """Return a style for each label, unique for up to 48 labels.

    Well-known methods have the same style in all figures. A method with parameters
    (``star:rank=4``) has the style of the bare method if that is not in the figure. All other
    labels get a style by their hash, with an unused colour if there is one.

    Args:
        labels: Methods, with parameters or without, in any order.
    """
    names = list(dict.fromkeys(labels))
    found = {name: _KNOWN.index(name) for name in names if name in _KNOWN}
    for name in names:
        if name in found:
            continue
        bare = name.replace(":", " ").split(" ", 1)[0]
        taken = set(found.values())
        if bare in _KNOWN and _KNOWN.index(bare) not in taken:
            found[name] = _KNOWN.index(bare)
            continue
        begin = int.from_bytes(sha256(name.encode(errors="replace")).digest()[:4], "big")
        order = [(begin + step) % len(_STYLES) for step in range(len(_STYLES))]
        colours = {_STYLES[place].colour for place in taken}
        free = [place for place in order if place not in taken] or order
        found[name] = next((p for p in free if _STYLES[p].colour not in colours), free[0])
    return {name: _STYLES[found[name]] for name in names}


def ordered_styles(names: Sequence[str]) -> dict[str, PlotStyle]:
    """Return a style for each of some ordered names, such as ``n = 2`` and ``n = 4``.

    Colours go from cold to warm; names with the same colour differ in marker and dashes.
    """
    last = max(1, len(names) - 1)
    return {
        name: PlotStyle(
            _ORDERED[round(place * (len(_ORDERED) - 1) / last)],
            MARKERS[place % len(MARKERS)],
            DASHES[place // len(_ORDERED) % len(DASHES)],
        )
        for place, name in enumerate(names)
    }
