"""Figures of studies: normalised averages against the number of models and against parameters.

All functions take ``averages``, a frame with a row for each method, setting and number of models:

- ``label``: the method with its non-default parameters, such as ``"star:rank=4"``
- ``method``: the method's name
- ``parameters``: all its parameters, as a dict
- ``n``: number of merged models
- ``combinations``: number of sets of models in the mean
- ``value``, ``low``, ``high``: the mean of the normalised averages and its 95 % interval

and optionally, to show single merges, ``runs``, with a row for each run: ``label``, ``method``,
``parameters``, ``n``, ``combination`` (its index), ``models`` (their names), ``seed``, ``value``
(its normalised average) and ``base`` (the base's on the same tasks).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from starmerge_models.errors import UsageError
from starmerge_models.study.dodge import Dodge
from starmerge_models.study.figures.cells import draw_cells
from starmerge_models.study.figures.style import (
    BASE_LINE,
    FAINT,
    SMALL,
    TUNED_LINE,
    add_legend,
    base_handle,
    dot_of,
    fit_labels,
    label_rows,
    line_of,
    new_figure,
    save,
    styled,
    tuned_handle,
)
from starmerge_models.study.palette import PlotStyle, ordered_styles, plot_styles

Frame: TypeAlias = Any
"""A pandas.DataFrame, for which mypy has no types."""

_Y = "normalised average, 95 % interval"


def plot_against_number(
    averages: Frame, path: Path, *, title: str, runs: Frame | None = None
) -> Figure:
    """Draw the normalised average against the number of merged models, a curve for each label.

    Dots with intervals are means over combinations of models, small pale dots single combinations.
    The base is a dashed line, the fine-tunes are a line at 1.

    Args:
        averages: Described above; one row for each label and n.
        path: Figure to write; see :func:`starmerge_models.study.figures.style.save`.
        title: The figure's title.
        runs: Described above; without it single combinations and the base are omitted.

    Raises:
        UsageError: There is nothing to draw, or a label has two rows for one n.
    """
    points = [(label, n, row) for label, n, row in _rows(averages)]
    _check_once([(label, n) for label, n, _ in points], "number of models")
    shown = plot_styles(label for label, _, _ in points)
    counts = sorted({n for _, n, _ in points})
    with styled():
        figure = new_figure(7, 4.2 + _legend_height(len(shown) + 2), title)
        axes = figure.subplots()
        place = _places(axes, counts, len(shown))
        for number, (label, style) in enumerate(shown.items()):
            _draw_curve(
                axes,
                [(place(n, number), row) for other, n, row in points if other == label],
                style,
                [
                    (place(run.n, number), run.value)
                    for run in _runs(runs)
                    if run.label == label and run.n in counts
                ],
            )
        has_base = _draw_base(axes, _base_by_number(runs))
        axes.axhline(1, **TUNED_LINE)
        axes.set_xlabel("models in a merge")
        axes.set_ylabel(_Y)
        _legend(figure, shown, has_base)
    return save(figure, path)


def plot_against_parameter(
    averages: Frame, parameter: str, path: Path, *, title: str, runs: Frame | None = None
) -> Figure:
    """Draw the normalised average against a parameter such as ``eta``, ``k`` or ``p``.

    With one label there is a curve for each number of models, in colours from cold to warm; with
    several labels there is a panel for each number of models with a curve for each label. A label
    with a single value of the parameter is a point.

    Args:
        averages: Described above; rows without the parameter are ignored.
        parameter: Its name.
        path: Figure to write; see :func:`starmerge_models.study.figures.style.save`.
        title: The figure's title.
        runs: Described above; without it single combinations and the base are omitted.

    Raises:
        UsageError: No row has the parameter as a number, or a curve has two rows for one value.
    """
    points = _with_parameter(averages, parameter)
    _check_once([(label, n, x) for label, n, x, _ in points], parameter)
    labels = list(dict.fromkeys(label for label, _, _, _ in points))
    counts = sorted({n for _, n, _, _ in points})
    panels: list[tuple[str, dict[str, PlotStyle], list[tuple[str, float, Any, int]]]]
    if len(labels) == 1:
        shades = ordered_styles([f"n = {n}" for n in counts])
        named = [(f"n = {n}", x, row, n) for _, n, x, row in points]
        panels = [(labels[0], shades, named)]
    else:
        shades = plot_styles(labels)
        panels = [
            (f"n = {n}", shades, [(label, x, row, n) for label, m, x, row in points if m == n])
            for n in counts
        ]
    across = 2 if len(panels) == 4 else min(3, len(panels))
    down = -(-len(panels) // across)
    with styled():
        width = 7 if across == 1 else 3.4 * across + 0.6
        height = (3.8 if down == 1 else 2.9 * down) + _legend_height(len(shades) + 2)
        figure = new_figure(width, height, title)
        grid = figure.subplots(down, across, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        has_base = False
        place = Dodge({x for *_, x, _ in points}, len(shades))
        for axes, (name, curves, rows) in zip(grid.flat, panels, strict=False):
            for number, (curve, style) in enumerate(curves.items()):
                own = [(place(x, number), row) for other, x, row, _ in rows if other == curve]
                single = [
                    (place(x, number), run.value)
                    for run in _runs(runs)
                    if (x := _number(run.parameters, parameter)) is not None
                    and curve == (run.label if len(labels) > 1 else f"n = {run.n}")
                    and run.label in labels
                    and run.n in {n for _, _, _, n in rows}
                ]
                _draw_curve(axes, own, style, single)
            base = _base_by_number(runs)
            levels = [base[n] for n in sorted({n for *_, n in rows}) if n in base]
            if levels:
                has_base = True
                axes.axhline(float(np.mean(levels)), **BASE_LINE)
            axes.axhline(1, **TUNED_LINE)
            axes.set_xlabel(*fit_labels([parameter], 150, SMALL))
            if len(panels) > 1 or len(labels) == 1:
                axes.set_title(*fit_labels([name], 72 * 2.6, SMALL), loc="left")
        for axes in grid[:, 0]:
            axes.set_ylabel(_Y)
        _legend(figure, shades, has_base)
    return save(figure, path)


def plot_best_parameter(best: Frame, parameter: str, path: Path, *, title: str) -> Figure:
    """Draw the best value of a parameter against the number of models, a curve for each label.

    Args:
        best: A row for each label and n with ``label``, ``n``, ``best``, and ``low`` and ``high``,
            the interval of the best value over resamples of the rows.
        parameter: Its name.
        path: Figure to write; see :func:`starmerge_models.study.figures.style.save`.
        title: The figure's title.

    Raises:
        UsageError: There is nothing to draw, or a label has two rows for one n.
    """
    points = [(str(row.label), int(row.n), row) for row in best.itertuples(index=False)]
    if not points:
        raise UsageError(f"No method was run with several values of {parameter!r}.")
    _check_once([(label, n) for label, n, _ in points], "number of models")
    shown = plot_styles(label for label, _, _ in points)
    counts = sorted({n for _, n, _ in points})
    with styled():
        figure = new_figure(6.5, 3.8 + _legend_height(len(shown)), title)
        axes = figure.subplots()
        place = _places(axes, counts, len(shown))
        for number, (label, style) in enumerate(shown.items()):
            own = [(place(n, number), row) for other, n, row in points if other == label]
            own.sort(key=lambda pair: pair[0])
            axes.errorbar(
                [x for x, _ in own],
                [row.best for _, row in own],
                yerr=[
                    [row.best - row.low for _, row in own],
                    [row.high - row.best for _, row in own],
                ],
                **line_of(style),
                elinewidth=1,
            )
        axes.set_xlabel("models in a merge")
        axes.set_ylabel(f"best {fit_labels([parameter], 100, SMALL)[0]}, 95 % interval")
        _legend(figure, shown, None)
    return save(figure, path)


def plot_grid(
    averages: Frame, one_shot: Mapping[str, Mapping[str, Any]], path: Path, *, title: str
) -> Figure:
    """Draw the default setting and the best of the grid, for each label and number of models.

    A filled dot with its interval is the default setting, without a search; a hollow dot is the
    best of the grid; pale dots are the grid's other settings. A label without a run of the default
    has only the hollow dot.

    Args:
        averages: Described above.
        one_shot: The default parameters by label.
        path: Figure to write; see :func:`starmerge_models.study.figures.style.save`.
        title: The figure's title.

    Raises:
        UsageError: There is nothing to draw.
    """
    points = list(_rows(averages))
    keys = sorted(dict.fromkeys((n, label) for label, n, _ in points), key=lambda key: key[0])
    shown = plot_styles(label for _, label in keys)
    several = len({n for n, _ in keys}) > 1
    with styled():
        figure = new_figure(7, 0.27 * len(keys) + 1.1, title)
        axes = figure.subplots()
        for place, (n, label) in enumerate(keys):
            own = [row for other, m, row in points if other == label and m == n]
            best = max(own, key=lambda row: row.value)
            dot = dot_of(shown[label])
            axes.plot([row.value for row in own], [place] * len(own), **dot, alpha=0.25, ms=3)
            axes.plot(best.value, place, **dot, markersize=7, markerfacecolor="none", zorder=3)
            for row in own:
                if dict(row.parameters) == dict(one_shot.get(label, {"": None})):
                    axes.plot([row.value, best.value], [place] * 2, color=dot["color"], lw=0.8)
                    axes.errorbar(row.value, place, xerr=_error([row]), **dot, elinewidth=1.2)
        label_rows(axes, [f"{label}, n = {n}" if several else label for n, label in keys])
        axes.set_xlabel(_Y)
        handles = [
            Line2D([], [], color=FAINT, marker="o", linestyle="none"),
            Line2D([], [], color=FAINT, marker="o", linestyle="none", ms=7, markerfacecolor="none"),
            Line2D([], [], color=FAINT, marker="o", linestyle="none", ms=3, alpha=0.4),
        ]
        add_legend(figure, handles, ["without a search", "best of the grid", "others of the grid"])
    return save(figure, path)


def plot_heat_map(
    frame: Frame,
    path: Path,
    *,
    title: str,
    rows: str = "task",
    columns: str = "label",
    value: str = "value",
) -> Figure:
    """Draw one number for each pair, such as each task and method, as a coloured cell.

    Args:
        frame: A row for each pair; a missing pair or a NaN is an empty cell.
        path: Figure to write; see :func:`starmerge_models.study.figures.style.save`.
        title: The figure's title.
        rows: The column of ``frame`` with the names of the rows, in order.
        columns: The column of ``frame`` with the names of the columns, in order.
        value: The column of ``frame`` with the numbers; also names the colour scale.

    Raises:
        UsageError: There is nothing to draw, or a pair has two numbers.
    """
    names = [list(dict.fromkeys(map(str, frame[key]))) for key in (rows, columns)]
    if not names[0]:
        raise UsageError("There are no numbers to draw a heat map of.")
    pairs = list(zip(map(str, frame[rows]), map(str, frame[columns]), strict=True))
    _check_once(pairs, f"{rows} and {columns}")
    cells = np.full((len(names[0]), len(names[1])), np.nan)
    for (row, column), number in zip(pairs, frame[value], strict=True):
        cells[names[0].index(row), names[1].index(column)] = number
    with styled():
        width = min(14.0, 3.4 + 0.62 * len(names[1]))
        figure = new_figure(width, 0.3 * len(names[0]) + 1.5, title)
        axes = figure.subplots()
        image = draw_cells(axes, cells, *names)
        bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(*fit_labels([value], 100, SMALL))
    return save(figure, path)


def _rows(averages: Frame) -> Iterator[tuple[str, int, Any]]:
    """Yield label, number of models and row of the averages that are not NaN."""
    count = 0
    for row in averages.itertuples(index=False):
        if not math.isnan(row.value):
            count += 1
            yield str(row.label), int(row.n), row
    if not count:
        raise UsageError("The study has no averages yet, so there is nothing to draw.")


def _with_parameter(averages: Frame, parameter: str) -> list[tuple[str, int, float, Any]]:
    """Return label, number of models, the parameter's value and row, sorted by the value."""
    found = [
        (label, n, x, row)
        for label, n, row in _rows(averages)
        if (x := _number(row.parameters, parameter)) is not None
    ]
    if not found:
        known = sorted({key for own in averages.parameters for key in own})
        raise UsageError(
            f"No run has the parameter {parameter!r} as a number. "
            f"The runs have {', '.join(known) or 'no parameters'}."
        )
    return sorted(found, key=lambda point: point[2])


def _number(parameters: Mapping[str, Any], name: str) -> float | None:
    value = parameters.get(name)
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return float(value) if is_number else None  # type: ignore[arg-type]


def _runs(runs: Frame | None) -> Iterator[Any]:
    return iter(()) if runs is None else runs.itertuples(index=False)


def _check_once(keys: Sequence[Any], what: str) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise UsageError(
                f"{', '.join(map(str, key))}: there are two averages for this {what}. Give the "
                "rows of one setting, or a different label for each setting."
            )
        seen.add(key)


def _error(rows: Sequence[Any]) -> list[list[float]]:
    """Return the lengths of error bars below and above; 0 without an interval."""
    return [
        [max(0.0, row.value - row.low) if row.low == row.low else 0.0 for row in rows],
        [max(0.0, row.high - row.value) if row.high == row.high else 0.0 for row in rows],
    ]


def _draw_curve(
    axes: Axes,
    points: Sequence[tuple[float, Any]],
    style: PlotStyle,
    single: Sequence[tuple[float, float]],
) -> None:
    """Draw the means with their intervals, connected by a line, and single merges behind them."""
    points = sorted(points, key=lambda point: point[0])
    if single:
        axes.plot(
            [x for x, _ in single],
            [value for _, value in single],
            **dot_of(style) | {"markersize": 3.2, "alpha": 0.4, "markeredgewidth": 0},
            zorder=1.8,
        )
    axes.errorbar(
        [x for x, _ in points],
        [row.value for _, row in points],
        yerr=_error([row for _, row in points]),
        **line_of(style),
        elinewidth=1,
        zorder=2.5,
    )


def _draw_base(axes: Axes, base: Mapping[int, float]) -> bool:
    """Draw the base's averages by number of models, if any; a single one as a horizontal line."""
    if len(base) == 1:
        axes.axhline(*base.values(), **BASE_LINE)
    elif base:
        axes.plot(list(base), list(base.values()), **BASE_LINE)
    return bool(base)


def _base_by_number(runs: Frame | None) -> dict[int, float]:
    """Return the mean of the base over the combinations of each number of models."""
    found: dict[int, dict[int, float]] = {}
    for run in _runs(runs):
        if not math.isnan(run.base):
            found.setdefault(int(run.n), {})[int(run.combination)] = run.base
    return {n: float(np.mean(list(found[n].values()))) for n in sorted(found)}


def _places(axes: Axes, counts: Sequence[int], curves: int) -> Dodge:
    """Set up the x-axis for ascending numbers of models, and return the dodge of the curves.

    The axis has a tick for each number, and a logarithmic scale for a large range.
    """
    is_log = counts[-1] > 8 * counts[0]
    if is_log:
        axes.set_xscale("log", base=2)
    ticks = counts if len(counts) <= 12 else counts[:: -(-len(counts) // 12)]
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if len(counts) == 1:
        axes.set_xlim(counts[0] - 1, counts[0] + 1)
    return Dodge(counts, curves, is_log=is_log)


def _legend_height(count: int) -> float:
    return 0.17 * math.ceil(count / 3)


def _legend(figure: Figure, shown: Mapping[str, PlotStyle], has_base: bool | None) -> None:
    """Add a legend of the curves and, unless ``has_base`` is None, of the reference lines."""
    handles: list[Artist] = [Line2D([], [], **line_of(style)) for style in shown.values()]
    names = list(shown)
    if has_base is not None:
        handles += [*([base_handle()] if has_base else ()), tuned_handle()]
        names += [*(["base"] if has_base else ()), "fine-tunes"]
    add_legend(figure, handles, names)
