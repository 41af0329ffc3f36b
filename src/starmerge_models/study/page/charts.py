"""Charts for pages, from DataFrames: curves, dots with intervals, heat maps.

All charts have tooltips, and the plot styles of the figures
(:mod:`starmerge_models.study.palette`). Text and axes have the page's text colour, so that charts
are readable in light and dark mode, and in print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import altair as alt

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.model_groups import BASE, TUNED
from starmerge_models.study.dodge import Dodge
from starmerge_models.study.page.parts import Chart
from starmerge_models.study.palette import (
    BASE_COLOUR,
    BASE_DASHES,
    DIVERGING,
    SEQUENTIAL,
    PlotStyle,
    ordered_styles,
    plot_styles,
)

Frame: TypeAlias = Any
"""A pandas.DataFrame, for which mypy has no types."""

_INK = "currentColor"
_NARROW = 560
"""Smallest width of a chart, in pixels; narrower pages scroll it."""


def dots(frame: Frame, *, title: str = "score", zero_to_one: bool = True) -> alt.LayerChart:
    """Draw values with intervals as dots: a row for each ``row``, with a dot for each label.

    The labels "base" (dashed) and "fine-tuned" (solid) are vertical lines across their row, with a
    pale band for the interval.

    Args:
        frame: ``row`` (such as the task), ``label`` (such as the model), ``value``, and optionally
            ``low`` and ``high``; the tooltips show all further columns.
        title: Title of the axis.
        zero_to_one: Whether the axis always includes 0 and 1.

    Raises:
        UsageError: There is nothing to draw.
    """
    records = _records(frame, "value")
    rows = list(dict.fromkeys(record["row"] for record in records))
    labels = [
        label
        for label in dict.fromkeys(record["label"] for record in records)
        if label not in (BASE, TUNED)
    ]
    shown = plot_styles(labels)
    ends = [
        number
        for record in records
        for number in map(record.get, ("value", "low", "high"))
        if number is not None
    ]
    if zero_to_one:
        ends += [0, 1]
    room = 0.02 * (max(ends) - min(ends)) or 0.02
    domain = [min(ends) - room, max(ends) + room]
    scale = alt.Scale(domain=domain, nice=False, zero=False)
    x = alt.X("value:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6))
    low = alt.X("low:Q", title=title, scale=scale)
    upright: dict[str, Any] = {
        "title": None,
        "sort": rows,
        "scale": alt.Scale(paddingInner=0.2, paddingOuter=0.1),
        "axis": alt.Axis(domain=False, ticks=False),
    }
    y = alt.Y("row:N", **upright)
    tooltip = _tooltip(records, ("row", "label", "value", "low", "high"), {"label": "model"})
    layers: list[Any] = []
    lines = {BASE: list(BASE_DASHES), TUNED: [1, 0]}
    lines = {label: lines[label] for label in lines if any(r["label"] == label for r in records)}
    dashes = alt.StrokeDash(
        "label:N",
        scale=alt.Scale(domain=list(lines), range=list(lines.values())),
        legend=alt.Legend(
            orient="top",
            title=None,
            symbolType="stroke",
            symbolStrokeColor=BASE_COLOUR,
            symbolSize=350,
        ),
    )
    if not zero_to_one:
        zero = alt.Chart(alt.Data(values=[{"level": 0}])).mark_rule(color=_INK, opacity=0.6)
        layers.append(zero.encode(x=alt.X("level:Q", title=title, scale=scale)))
    for label in lines:
        own = [record for record in records if record["label"] == label]
        colour = BASE_COLOUR if label == BASE else _INK
        line = alt.Chart(alt.Data(values=own)).encode(
            y=alt.Y("row:N", **upright, bandPosition=0),
            y2=alt.Y2("row:N", bandPosition=1),
            tooltip=tooltip,
        )
        layers += [
            line.mark_rect(color=colour, opacity=0.13).encode(x=low, x2="high:Q"),
            line.mark_rule(color=colour, strokeWidth=1.8).encode(x=x, strokeDash=dashes),
        ]
    merged = [record for record in records if record["label"] in shown]
    # Dots in the same row are offset vertically.
    is_shared = len({record["row"] for record in merged}) < len(merged)
    # A row named after its dot needs no legend.
    has_legend = any(record["row"] != record["label"] for record in merged)
    if merged:
        offset = {"yOffset": alt.YOffset("label:N", sort=labels)} if is_shared else {}
        place = alt.Chart(alt.Data(values=merged)).encode(
            y=y, tooltip=tooltip, **offset, **_coloured(shown, has_legend=has_legend)
        )
        has_intervals = any(record.get("low") is not None for record in merged)
        rules = place.mark_rule(strokeWidth=1.6).encode(x=low, x2="high:Q")
        shape = _shape(shown, has_legend=has_legend)
        points = place.mark_point(filled=True, size=62, opacity=1).encode(x=x, shape=shape)
        if has_legend:
            chosen = alt.selection_point(fields=["label"], bind="legend")
            faded = alt.condition(chosen, alt.value(1), alt.value(0.15))
            rules = rules.encode(opacity=faded)
            points = points.encode(opacity=faded).add_params(chosen)
        layers += [*([rules] if has_intervals else ()), points]
    height = len(rows) * (14 * max(2, len(labels) if is_shared else 1) + 14)
    return _wide(alt.layer(*layers), height)


def curves(
    averages: Frame, x: str = "n", *, runs: Frame | None = None, title: str | None = None
) -> alt.LayerChart:
    """Draw normalised averages against the number of models or a parameter, a curve for each label.

    If ``x`` is a parameter, a single label has a curve for each number of models; with several
    labels the reader selects the number of models from a list.

    Args:
        averages: As described in :mod:`starmerge_models.study.figures.curves`: ``label``,
            ``method``, ``parameters``, ``n``, ``combinations``, ``value``, ``low``, ``high``.
        x: ``"n"``, or the name of a numeric parameter.
        runs: As described there; adds single combinations as small dots, and the base's line.
        title: Title of the x-axis.

    Raises:
        UsageError: There is nothing to draw, no run has the parameter, or a curve has two rows for
            one place.
    """
    points = _points(_rows_of(averages), x)
    if not points:
        raise UsageError(f"No average has the number {x!r}, so there is no curve to draw.")
    _check_once(points, x)
    labels = list(dict.fromkeys(point["label"] for point in points))
    counts = sorted({point["n"] for point in points})
    by_count = x != "n" and len(labels) == 1
    series = [f"n = {n}" for n in counts] if by_count else labels
    shown = ordered_styles(series) if by_count else plot_styles(series)
    single = [
        point
        for point in _points(_rows_of(runs), x)
        if point["label"] in labels and point["n"] in counts
    ]
    for point in (*points, *single):
        point["series"] = f"n = {point['n']}" if by_count else point["label"]
    values = sorted({point["x"] for point in points})
    dodge = Dodge(values, len(series), is_log=_is_wide(values, x))
    for point in (*points, *single):
        point["place"] = dodge(point["x"], series.index(point["series"]))
    where = _along(values, x, title or (f"{x} of {labels[0]}" if by_count else x))
    upright: dict[str, Any] = {
        "title": "normalised average, 95 % interval",
        "scale": alt.Scale(zero=False),
    }
    level = alt.Y("value:Q", **upright)
    tooltip = _tooltip(points, ("label", "n", "x", "value", "low", "high"), {"x": x})
    chosen = alt.selection_point(fields=["series"], bind="legend")
    faded = alt.condition(chosen, alt.value(1), alt.value(0.12))
    is_chosen = x != "n" and not by_count and len(counts) > 1

    def drawn(records: Sequence[Mapping[str, Any]]) -> alt.Chart:
        chart = alt.Chart(alt.Data(values=list(records)))
        return chart.transform_filter("datum.n == models") if is_chosen else chart

    main = drawn(points).encode(
        x=where,
        tooltip=tooltip,
        opacity=faded,
        **_coloured(shown, "series"),
    )
    layers: list[Any] = [*_line_at_one(upright)]
    base = _base(single, counts)
    if x == "n" and len(base) > 1:
        along = _along(values, x, title or x, "n")
        line, last = (drawn(part).encode(x=along, y=level) for part in (base, base[-1:]))
        layers.append(line.mark_line(**_BASE_MARK).encode(tooltip=_BASE_TOOLTIP))
        layers.append(last.mark_text(text=BASE, dy=-9, fontSize=11, color=BASE_COLOUR))
    elif base:
        if not is_chosen:
            base = [{"value": sum(one["value"] for one in base) / len(base)}]
        line = drawn(base).encode(y=level, tooltip=_BASE_TOOLTIP)
        text = line.mark_text(text=BASE, align="right", dy=-8, fontSize=11, color=BASE_COLOUR)
        layers += [line.mark_rule(**_BASE_MARK), text.encode(x=alt.value("width"))]
    if single:
        layers.append(
            drawn(single)
            .mark_circle(size=14, opacity=0.35)
            .encode(
                x=where,
                y=level,
                tooltip=_tooltip(single, ("label", "n", "x", "combination", "value"), {"x": x}),
                **_coloured(shown, "series"),
            )
        )
    layers += [
        main.mark_rule(strokeWidth=1.4).encode(y=alt.Y("low:Q", **upright), y2="high:Q"),
        main.mark_line(strokeWidth=2).encode(y=level, strokeDash=_dashed(shown, "series")),
        main.mark_point(filled=True, size=70)
        .encode(y=level, shape=_shape(shown, "series"))
        .add_params(chosen),
    ]
    chart = alt.layer(*layers)
    if is_chosen:
        listed = alt.binding_select(options=counts, name="models in a merge ")
        chart = chart.add_params(alt.param(name="models", value=counts[0], bind=listed))
    return _wide(chart, 380)


def heat_map(
    frame: Frame,
    x: str,
    y: str,
    value: str,
    *,
    choice: str | None = None,
    diverging: bool = False,
    form: str = ".2f",
) -> alt.LayerChart:
    """Draw one number for each pair as a coloured cell: a rank map, a matrix of conflicts.

    Args:
        frame: A row for each pair; the tooltips show further columns.
        x: The column of ``frame`` with the names or numbers of the columns, ordered by its
            categories if it has any, otherwise by occurrence.
        y: The column of ``frame`` with the names or numbers of the rows, ordered likewise.
        value: The column of ``frame`` with the number.
        choice: A column of names, of which the reader selects one from a list; all share the colour
            scale.
        diverging: Whether the colour scale is centred at zero.
        form: D3's format of the numbers.

    Raises:
        UsageError: There is nothing to draw.
    """
    names = {x: "x", y: "y", value: "value"} | ({choice: "choice"} if choice is not None else {})
    others = [column for column in frame.columns if column not in (*names, *names.values())]
    records = _records(frame[[*names, *others]].rename(columns=names), "value")
    columns, rows = (_names_in(frame[key]) for key in (x, y))
    titles = {"x": x, "y": y, "value": value, "choice": choice or ""}
    numbers = [record["value"] for record in records]
    limit = max(map(abs, numbers))
    if diverging:
        ends = [-limit, -limit / 2, 0, limit / 2, limit] if limit else [-1, -0.5, 0, 0.5, 1]
        scale = alt.Scale(range=list(DIVERGING), domain=ends)
        dark = f"abs(datum.value) > {0.7 * limit}"
    else:
        scale = alt.Scale(scheme=SEQUENTIAL, domain=[min(numbers), max(numbers)])
        dark = f"datum.value < {(min(numbers) + max(numbers)) / 2}"
    cells = _chosen(records, choice).encode(
        x=alt.X("x:N", title=x, sort=columns, axis=alt.Axis(labelAngle=-40, labelLimit=130)),
        y=alt.Y("y:N", title=y, sort=rows),
        tooltip=_tooltip(records, ("choice", "y", "x", "value"), titles),
    )
    layers: list[Any] = [
        cells.mark_rect().encode(
            color=alt.Color("value:Q", scale=scale, title=value, legend=alt.Legend(format=form))
        )
    ]
    if len(columns) <= 14 and len(rows) <= 40:
        layers.append(
            cells.mark_text(fontSize=11).encode(
                text=alt.Text("value:Q", format=form),
                color=alt.condition(dark, alt.value("white"), alt.value("black")),
            )
        )
    height = len(rows) * (26 if len(rows) <= 24 else 14)
    return _wide(_with_list(alt.layer(*layers), records, choice), max(height, 60))


def lines(
    frame: Frame,
    x: str,
    y: str,
    *,
    choice: str | None = None,
    level: tuple[float, str] | None = None,
) -> alt.LayerChart:
    """Draw numbers against a number, a line for each label.

    Args:
        frame: ``label`` and the columns named below, a row for each point.
        x: The column with the places on the x-axis, and its title.
        y: The column with the numbers, and the axis' title.
        choice: A column of names, of which the reader selects one from a list.
        level: Value and label of a dashed line.

    Raises:
        UsageError: There is nothing to draw.
    """
    names = {y: "value", x: "x"} | ({choice: "choice"} if choice is not None else {})
    records = _records(frame[["label", *names]].rename(columns=names), "value", ("label", "choice"))
    shown = plot_styles(record["label"] for record in records)
    upright: dict[str, Any] = {"title": y, "scale": alt.Scale(nice=False, zero=True)}
    chosen = alt.selection_point(fields=["label"], bind="legend")
    titles = {"x": x, "value": y, "choice": choice or ""}
    curve = _chosen(records, choice).encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("value:Q", **upright),
        tooltip=_tooltip(records, ("label", "choice", "x", "value"), titles),
        opacity=alt.condition(chosen, alt.value(1), alt.value(0.12)),
        **_coloured(shown),
    )
    layers: list[Any] = []
    if level is not None:
        line = alt.Chart(alt.Data(values=[{"level": level[0]}]))
        line = line.encode(y=alt.Y("level:Q", **upright))
        name = line.mark_text(text=level[1], align="right", dy=-8, fontSize=11, color=_INK)
        layers = [
            line.mark_rule(color=_INK, opacity=0.6, strokeDash=list(BASE_DASHES)),
            name.encode(x=alt.value("width")),
        ]
    layers += [
        curve.mark_line(strokeWidth=2).encode(strokeDash=_dashed(shown, "label")),
        curve.mark_point(filled=True, size=44).encode(shape=_shape(shown)).add_params(chosen),
    ]
    return _wide(_with_list(alt.layer(*layers), records, choice), 360)


def specification(part: Chart) -> dict[str, Any]:
    """Return the Vega-Lite specification of a chart, in the style of all pages."""
    found: dict[str, Any] = part.chart.to_dict(validate=True)
    quiet = {"labelColor": _INK, "titleColor": _INK, "tickColor": _INK, "domainColor": _INK}
    found["description"] = part.description
    found["config"] = {
        "background": None,
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {
            **quiet,
            "gridColor": _INK,
            "gridOpacity": 0.13,
            "domainOpacity": 0.5,
            "tickOpacity": 0.5,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "labelLimit": 170,
            "titlePadding": 10,
        },
        "legend": {
            "labelColor": _INK,
            "titleColor": _INK,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "labelLimit": 260,
            "symbolSize": 80,
        },
        "text": {"color": _INK},
    }
    return found


def _chosen(records: Sequence[Mapping[str, Any]], choice: str | None) -> alt.Chart:
    """Return a chart of the records, filtered by the reader's selection if there is a choice."""
    chart = alt.Chart(alt.Data(values=list(records)))
    return chart if choice is None else chart.transform_filter("datum.choice == shown")


def _with_list(
    chart: alt.LayerChart, records: Sequence[Mapping[str, Any]], choice: str | None
) -> alt.LayerChart:
    """Return a chart with a selection list, the first entry selected."""
    if choice is None:
        return chart
    options = list(dict.fromkeys(record["choice"] for record in records))
    listed = alt.binding_select(options=options, name=f"{choice} ")
    return chart.add_params(alt.param(name="shown", value=options[0], bind=listed))


def _wide(chart: alt.LayerChart, height: int) -> alt.LayerChart:
    return chart.properties(width="container", height=height)


def _names_in(column: Any) -> list[str]:
    """Return the unique names in a column of a frame: its categories, if it has any."""
    names = column.cat.categories if hasattr(column, "cat") else column
    return list(dict.fromkeys(str(_plain(name)) for name in names))


_NAMES = ("row", "label", "x", "y", "choice")


def _records(frame: Frame, number: str, names: Sequence[str] = _NAMES) -> list[dict[str, Any]]:
    """Return the rows with a number in a column, as plain data; ``names`` are converted to str."""
    found = []
    for row in frame.to_dict("records"):
        record = {str(key): _plain(value) for key, value in row.items()}
        if record[number] is not None:
            record |= {key: str(record[key]) for key in names if key in record}
            found.append(record)
    if not found:
        raise UsageError("There are no numbers to draw a chart of.")
    return found


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _rows_of(frame: Frame | None) -> list[dict[str, Any]]:
    return [] if frame is None else list(frame.to_dict("records"))


def _points(rows: Iterable[Mapping[str, Any]], x: str) -> list[dict[str, Any]]:
    """Return the rows with a position on the x-axis, as plain data without nested values."""
    found = []
    for row in rows:
        place = _plain(row["n"] if x == "n" else row["parameters"].get(x))
        if isinstance(place, bool) or not isinstance(place, int | float):
            continue
        if _plain(row["value"]) is None:
            continue
        point = {
            key: _plain(value) for key, value in row.items() if key not in ("parameters", "models")
        }
        point |= {"x": place, "label": str(row["label"])}
        if row.get("models"):
            point["models"] = ", ".join(map(str, row["models"]))
        found.append(point)
    return found


def _is_wide(values: Sequence[float], x: str) -> bool:
    """Return whether ascending numbers of models need a logarithmic scale."""
    return x == "n" and values[-1] > 8 * values[0] > 0


def _along(values: Sequence[float], x: str, title: str, field: str = "place") -> alt.X:
    """Return the x-axis of curves, with a tick at each value, or at round numbers for many."""
    log = {"type": "log", "base": 2} if _is_wide(values, x) else {"zero": False}
    # The same format as elsewhere: 2 and 0.25, not 2.00.
    axis = alt.Axis(values=list(values), format="~g") if len(values) <= 12 else alt.Axis()
    title = "models in a merge" if title == "n" else title
    return alt.X(f"{field}:Q", title=title, scale=alt.Scale(padding=12, **log), axis=axis)


_BASE_MARK: dict[str, Any] = {
    "color": BASE_COLOUR,
    "strokeWidth": 1.8,
    "strokeDash": list(BASE_DASHES),
}
_BASE_TOOLTIP = [alt.Tooltip("value:Q", title=BASE, format=".3f")]


def _base(points: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> list[dict[str, Any]]:
    """Return the base's mean over the combinations, for each number of models."""
    found: list[dict[str, Any]] = []
    for n in counts:
        values = {
            point["combination"]: point["base"]
            for point in points
            if point["n"] == n and point["base"] is not None
        }
        if values:
            found.append({"n": n, "value": sum(values.values()) / len(values)})
    return found


def _check_once(points: Sequence[Mapping[str, Any]], x: str) -> None:
    """Make sure that a curve has one average for each position."""
    seen = set()
    for point in points:
        key = (point["label"], point["n"], point["x"])
        if key in seen:
            raise UsageError(
                f"{point['label']}, n = {point['n']}: there are two averages for {x} = "
                f"{point['x']}. Give the rows of one setting, or a label for each setting."
            )
        seen.add(key)


def _line_at_one(upright: Mapping[str, Any]) -> list[alt.Chart]:
    """Return the fine-tunes' line at 1, labelled at its right end."""
    line = alt.Chart(alt.Data(values=[{"level": 1}])).encode(y=alt.Y("level:Q", **upright))
    name = line.mark_text(text="fine-tunes", align="right", dy=-8, fontSize=11, color=_INK)
    return [
        line.mark_rule(color=_INK, opacity=0.8),
        name.encode(x=alt.value("width")),
    ]


def _coloured(
    shown: Mapping[str, PlotStyle],
    key: str = "label",
    *,
    has_legend: bool = True,
) -> dict[str, Any]:
    """Return the encoding of colour, with a legend above the chart in as many columns as fit."""
    longest = max((min(len(name), 40) for name in shown), default=1)
    columns = max(1, min(len(shown), 78 // (longest + 6)))
    legend = alt.Legend(orient="top", columns=columns, title=None, symbolOpacity=1)
    return {
        "color": alt.Color(
            f"{key}:N",
            scale=alt.Scale(domain=list(shown), range=[style.colour for style in shown.values()]),
            legend=legend if has_legend else None,
        )
    }


def _dashed(shown: Mapping[str, PlotStyle], key: str) -> alt.StrokeDash:
    strokes = [list(style.dashes) or [1, 0] for style in shown.values()]
    scale = alt.Scale(domain=list(shown), range=strokes)
    return alt.StrokeDash(f"{key}:N", scale=scale, title=None)


def _shape(
    shown: Mapping[str, PlotStyle], key: str = "label", *, has_legend: bool = True
) -> alt.Shape:
    scale = alt.Scale(domain=list(shown), range=[style.marker for style in shown.values()])
    # Vega merges the legends of colour and shape if both are enabled.
    off = {} if has_legend else {"legend": None}
    return alt.Shape(f"{key}:N", scale=scale, title=None, **off)


def _tooltip(
    records: Sequence[Mapping[str, Any]], first: Sequence[str], titles: Mapping[str, str]
) -> list[alt.Tooltip]:
    """Return tooltips of the columns without nested values, those in ``first`` first."""
    keys = [key for key in first if any(key in record for record in records)]
    known = {*keys, "series", "place", "method", "base"}
    keys += [key for key in records[0] if key not in known and key.isidentifier()]
    found = []
    for key in dict.fromkeys(keys):
        values = [record.get(key) for record in records]
        numbers = [value for value in values if isinstance(value, int | float)]
        name = titles.get(key, key)
        if numbers and all(value is None or isinstance(value, int | float) for value in values):
            form = {} if all(isinstance(number, int) for number in numbers) else {"format": ".3f"}
            found.append(alt.Tooltip(f"{key}:Q", title=name, **form))
        else:
            found.append(alt.Tooltip(f"{key}:N", title=name))
    return found
