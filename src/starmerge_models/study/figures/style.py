"""The style of all figures, fitting of text, and saving."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D

from starmerge_models.errors import UsageError
from starmerge_models.storage.publishing import output_file
from starmerge_models.study.palette import BASE_COLOUR, BASE_DASHES, TUNED_COLOUR, PlotStyle

DPI = 200
"""Resolution of PNG files, in pixels per inch."""

TEXT, FAINT, GRID = "#222222", "#5F6B76", "#E4E8EB"
SIZE, SMALL, LARGE = 9, 8, 11
"""Font sizes in points: of names and numbers, of notes, of titles."""

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": SIZE,
    "text.color": TEXT,
    # Names of models and tasks are plain text, even if they contain "$".
    "text.parse_math": False,
    "text.usetex": False,
    "axes.titlesize": SIZE,
    "axes.labelsize": SIZE,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#8A949E",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "figure.titlesize": LARGE,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "savefig.dpi": DPI,
    # TrueType, so that PDF files contain the fonts as text; outlines in SVG files.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "starmerge",
}

_MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "diamond": "D",
    "triangle-down": "v",
    "cross": "P",
    "triangle-right": ">",
    "triangle-left": "<",
}

BASE_LINE: dict[str, Any] = {
    "color": BASE_COLOUR,
    "linestyle": (0, BASE_DASHES),
    "linewidth": 1.2,
    "zorder": 1.5,
}
TUNED_LINE: dict[str, Any] = {"color": TUNED_COLOUR, "linewidth": 1.2, "zorder": 1.5}

_FORMATS = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
"""By suffix, options that remove metadata that would differ between two runs."""


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style of all figures within the block."""
    with mpl.rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty figure with its title at the top left, wrap to the width.

    Args:
        width: In inches.
        height: In inches, without the title.
        title: Any text.
    """
    lines = wrap(elide_middle(title, 140), 72 * (width - 0.3), LARGE)
    figure = Figure(figsize=(width, height + 0.19 * len(lines)), layout="constrained")
    figure.suptitle("\n".join(lines), x=0.1 / width, ha="left", fontsize=LARGE)
    return figure


def save(figure: Figure, path: Path) -> Figure:
    """Write a figure atomically, replacing an existing file, and return it.

    Args:
        figure: The figure.
        path: Its suffix determines the format: ``.png`` with 200 dots per inch, ``.pdf`` with
            embedded fonts, ``.svg`` with letters as outlines.

    Raises:
        UsageError: The suffix is not one of these, or the path is not writable.
        StarmergeError: The disk is full, or fails otherwise.
    """
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise UsageError(f"{path}: a figure is written as {', '.join(_FORMATS)}. Choose one.")
    # Drawn in memory: on a full disk, matplotlib would raise an error of its own.
    drawn = io.BytesIO()
    with styled(), output_file(path, overwrite=True) as partial:
        figure.savefig(drawn, format=suffix[1:], metadata=_FORMATS[suffix])
        partial.write_bytes(drawn.getvalue())
    return figure


def line_of(style: PlotStyle) -> dict[str, Any]:
    """Return matplotlib's options for a line with markers."""
    return {
        "color": style.colour,
        "marker": _MARKERS[style.marker],
        "linestyle": (0, style.dashes) if style.dashes else "solid",
    }


def dot_of(style: PlotStyle) -> dict[str, Any]:
    """Return matplotlib's options for markers without a line."""
    return line_of(style) | {"linestyle": "none"}


def add_legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """Add a legend below all panels, with as many columns as fit the width."""
    names = fit_labels(names, 72 * 2.4, SMALL)
    widths = [_width(name, SMALL) + 5.2 * SMALL for name in names]
    columns = len(names)
    while columns > 1 and _total(widths, columns) > 72 * (figure.get_figwidth() - 0.2):
        columns -= 1
    # matplotlib omits labels that begin with an underscore, so the names are set afterwards.
    legend = figure.legend(
        handles, ["x"] * len(names), loc="outside lower center", ncols=columns, handlelength=2.4
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def base_handle() -> Line2D:
    """Return the base's line for a legend."""
    return Line2D([], [], **BASE_LINE)


def tuned_handle() -> Line2D:
    """Return the fine-tunes' line for a legend."""
    return Line2D([], [], **TUNED_LINE)


def label_rows(axes: Axes, names: Sequence[str], *, width: float = 2.2) -> None:
    """Label the y-axis with the names of rows, the first on top, without ticks and spine.

    Args:
        axes: The axes.
        names: The names of the rows, at the positions 0, 1, 2 …
        width: Largest width of a name, in inches.
    """
    axes.set_yticks(
        range(len(names)), fit_labels(names, 72 * width, SIZE), fontsize=SIZE, color=TEXT
    )
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def elide_middle(text: str, most: int) -> str:
    """Return a text on one line of at most ``most`` characters, its middle elided: ``be…nd``."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def fit_labels(names: Iterable[str], width: float, size: float) -> list[str]:
    """Elide the middles of names that are wider than a width.

    Different names stay different: names that would become equal get a number.

    Args:
        names: Any texts.
        width: Largest width, in points.
        size: Font size, in points.
    """
    found: dict[str, str] = {}
    for name in names:
        short, suffix = _fit(name, width, size), 1
        while short in found.values() and name not in found:
            suffix += 1
            short = _fit(name, width - _width(f" {suffix}", size), size) + f" {suffix}"
        found.setdefault(name, short)
    return [found[name] for name in names]


def wrap(text: str, width: float, size: float) -> list[str]:
    """Wrap a text into lines of a largest width; long words are broken.

    Args:
        text: Any text.
        width: Largest width, in points.
        size: Font size, in points.
    """
    for characters in range(max(1, int(width / (0.4 * size))), 0, -1):
        lines = textwrap.wrap(text, characters) or [""]
        if all(_width(line, size) <= width for line in lines):
            return lines
    return [""]


def _total(widths: Sequence[float], columns: int) -> float:
    """Return the width of a legend with a number of columns, in matplotlib's column-major order."""
    return float(sum(column.max() for column in np.array_split(np.array(widths), columns)))


def _fit(name: str, width: float, size: float) -> str:
    most = len(name)
    while most > 1 and _width(elide_middle(name, most), size) > width:
        most -= max(1, most // 12)
    return elide_middle(name, most)


def _width(text: str, size: float) -> float:
    """Return the width of a line of text, in points, with a margin for rendering."""
    return 1.03 * size * sum(map(_advance, text))


@cache
def _advance(character: str) -> float:
    """Return the width of a character, in units of the font size."""
    font = get_font(findfont(_SETTINGS["font.family"]))
    font.set_size(100, 72)
    return float(font.load_char(ord(character)).linearHoriAdvance) / 65536 / 100
