"""The parts of a page's sections. Their content is text, never HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import altair as alt

Frame: TypeAlias = Any
"""A pandas.DataFrame, for which mypy has no types."""


@dataclass(frozen=True)
class Text:
    """Paragraphs in Markdown: emphasis, code, lists; neither HTML, links nor images.

    For the project's own sentences only. Text with user-defined names must be in :class:`Notes`,
    which shows every character literally.
    """

    markdown: str


@dataclass(frozen=True)
class Notes:
    """Sentences, one per line, shown literally."""

    lines: Sequence[str]


@dataclass(frozen=True)
class KeyFigure:
    """A prominent number."""

    label: str
    value: str
    note: str = ""
    """A note, such as its interval."""
    colour: str | None = None
    """The label's colour in the charts, ``#RRGGBB``."""


@dataclass(frozen=True)
class KeyFigures:
    """Prominent numbers in a row."""

    figures: Sequence[KeyFigure]


@dataclass(frozen=True)
class Table:
    """A table that the reader can sort by any column and filter by words."""

    frame: Frame
    """The data. Numbers are sorted numerically; NaN and None are shown as "–"."""
    caption: str
    intervals: Mapping[Any, tuple[Any, Any]] = field(default_factory=dict)
    """For a column, the columns with the ends of its intervals, shown in the same cells."""
    formats: Mapping[Any, str] = field(default_factory=dict)
    """Format specifications of numeric columns, such as ``".2f"``; by default three decimals, and
    none for integers."""
    titles: Mapping[Any, str] = field(default_factory=dict)
    """Titles of columns that differ from their name in ``frame``."""
    choices: Sequence[Any] = ()
    """Columns of few values, each with a list to filter by."""

    @property
    def columns(self) -> list[Any]:
        """The visible columns."""
        ends = {end for pair in self.intervals.values() for end in pair}
        return [column for column in self.frame.columns if column not in ends]

    def title(self, column: Any) -> str:
        """Return the title of a column."""
        return self.titles.get(column, str(column))

    @property
    def rows(self) -> list[list[Cell]]:
        """The visible cells, row by row."""
        records = self.frame.to_dict("records")
        return [[self._cell(record, column) for column in self.columns] for record in records]

    @property
    def numeric(self) -> list[bool]:
        """For each visible column, whether it has only numbers."""
        return [
            all(value is None or isinstance(value, int | float) for value in map(_value, values))
            for values in (self.frame[column] for column in self.columns)
        ]

    def _cell(self, record: Mapping[Any, Any], column: Any) -> Cell:
        value = _value(record[column])
        if not isinstance(value, int | float) or isinstance(value, bool):
            return Cell("–" if value is None else str(value), None)
        form = self.formats.get(column, "d" if isinstance(value, int) else ".3f")
        text = _number(value, form)
        if column in self.intervals:
            low, high = (_value(record[end]) for end in self.intervals[column])
            if low is not None and high is not None:
                text += f" [{_number(low, form)}, {_number(high, form)}]"
        return Cell(text, value)


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    order: float | None
    """The number to sort by; None to sort by the text."""


@dataclass(frozen=True)
class Chart:
    """A Vega-Altair chart with the page's width."""

    chart: alt.TopLevelMixin
    """The chart, with ``width="container"``, such as from
    :mod:`starmerge_models.study.page.charts`."""
    caption: str
    description: str
    """A description of the chart, also for screen readers."""


@dataclass(frozen=True)
class Copy:
    """A recipe or a command, with a copy button."""

    label: str
    text: str


@dataclass(frozen=True)
class Provenance:
    """Provenance of the numbers: nested data, collapsed by default."""

    content: Mapping[str, Any]
    label: str = "Provenance"

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The values with their key paths, such as ``models.star.path``."""
        return list(_flat("", self.content))


Part: TypeAlias = Text | Notes | KeyFigures | Table | Chart | Copy | Provenance


def _value(value: Any) -> Any:
    """Return a value as a Python object; None for NaN and pandas' missing values."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def _number(value: float, form: str) -> str:
    return format(value, form).replace("-", "−")


def _flat(place: str, content: Any) -> list[tuple[str, str]]:
    if isinstance(content, Mapping) and content:
        pairs = [(f"{place}.{key}" if place else str(key), value) for key, value in content.items()]
        return [line for key, value in pairs for line in _flat(key, value)]
    if isinstance(content, list | tuple):
        if not any(isinstance(item, Mapping | list | tuple) for item in content):
            return [(place, ", ".join(map(str, content)) or "–")]
        found = [_flat(f"{place}.{number}", item) for number, item in enumerate(content, 1)]
        return [line for lines in found for line in lines]
    return [(place, "–" if content is None or content == {} else str(content))]
