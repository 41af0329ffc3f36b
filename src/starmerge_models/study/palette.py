"""How methods look in every picture: colours that colour-blind people tell apart, markers, lines.

The colours are those of Okabe and Ito (2008), "Color Universal Design", without black, which text
has, and yellow, which is too pale for a line on white. A method is also known by its marker and its
line, so that a picture can be read in black and white.
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
"""As Vega calls them."""

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
"""Of the base, which is always a dashed line."""
BASE_DASHES = (4.0, 3.0)
TUNED_COLOUR = "#4D4D4D"
"""Of the fine-tunes on white, which are always a line without gaps."""

SEQUENTIAL = "viridis"
"""Colour scale of heat maps, known to matplotlib and Vega by this name."""

DIVERGING = ("#00548A", "#66A9CF", "#F7F7F7", "#EE9F66", "#B24E00")
"""Colours of numbers around zero, such as cosines, from negative to positive; zero is white."""

_ORDERED = ("#5E4FA2", "#3288BD", "#2F9E8F", "#8AA82B", "#DD9A22", "#D9532C")
"""From cold to warm, none too dark for a dark page or too pale for a light one."""

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
"""Methods with a look of their own in every picture."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    """Hexadecimal, ``#RRGGBB``."""
    marker: Marker
    dashes: tuple[float, ...]
    """Lengths of strokes and gaps in line widths; empty for a line without gaps."""


_LOOKS = tuple(
    Look(COLOURS[column], MARKERS[(column + row) % len(MARKERS)], DASHES[row % len(DASHES)])
    for row in range(len(MARKERS))
    for column in range(len(COLOURS))
)
"""All looks, no two alike in colour and marker; of six in a row each has its own colour."""


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """Return a look for each label, different ones for up to 48 labels.

    Well-known methods have the same look in every picture. A method with parameters
    (``star:rank=4``) takes the look of the bare method where the bare method is not drawn. All
    other labels get a look by their hash, of a colour that is free if there is one.

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
        order = [(begin + step) % len(_LOOKS) for step in range(len(_LOOKS))]
        colours = {_LOOKS[place].colour for place in taken}
        free = [place for place in order if place not in taken] or order
        found[name] = next((p for p in free if _LOOKS[p].colour not in colours), free[0])
    return {name: _LOOKS[found[name]] for name in names}


def ordered_looks(names: Sequence[str]) -> dict[str, Look]:
    """Return a look for each of some names that have an order, such as ``n = 2`` and ``n = 4``.

    Colours go from cold to warm; names of one colour differ in marker and line.
    """
    last = max(1, len(names) - 1)
    return {
        name: Look(
            _ORDERED[round(place * (len(_ORDERED) - 1) / last)],
            MARKERS[place % len(MARKERS)],
            DASHES[place // len(_ORDERED) % len(DASHES)],
        )
        for place, name in enumerate(names)
    }
