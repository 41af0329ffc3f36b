"""The parts that a section of a page is made of. Whatever they hold is text, and never HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import altair as alt

Frame: TypeAlias = Any
"""A pandas.DataFrame, whose types mypy does not see."""


@dataclass(frozen=True)
class Text:
    """Paragraphs in Markdown: emphasis, code, lists; neither HTML, links nor images.

    For sentences of the project alone. What contains names that others chose belongs in
    :class:`Notes`, which shows each sign as it is.
    """

    markdown: str


@dataclass(frozen=True)
class Notes:
    """Sentences, a line each, shown sign by sign."""

    lines: Sequence[str]


@dataclass(frozen=True)
class KeyFigure:
    """A number to be seen first."""

    label: str
    value: str
    note: str = ""
    """Such as its interval."""
    colour: str | None = None
    """A colour ``#RRGGBB`` that stands for the label in the charts."""


@dataclass(frozen=True)
class KeyFigures:
    """Some numbers to be seen first, beside each other."""

    figures: Sequence[KeyFigure]


@dataclass(frozen=True)
class Table:
    """A table that the reader sorts by any column and filters by words."""

    frame: Frame
    """Numbers stay numbers: they are sorted as such. NaN and None are shown as "–"."""
    caption: str
    intervals: Mapping[Any, tuple[Any, Any]] = field(default_factory=dict)
    """For a column, those of the ends of its intervals, which are shown in its cells."""
    formats: Mapping[Any, str] = field(default_factory=dict)
    """Format specifications of columns of numbers, such as ``".2f"``; by default three digits
    after the point, and none for integers."""
    titles: Mapping[Any, str] = field(default_factory=dict)
    """What stands above columns, where that is not their name in ``frame``."""
    choices: Sequence[Any] = ()
    """Columns of few values, for each of which there is a list to choose one from."""

    @property
    def columns(self) -> list[Any]:
        """The columns that are shown."""
        ends = {end for pair in self.intervals.values() for end in pair}
        return [column for column in self.frame.columns if column not in ends]

    def title(self, column: Any) -> str:
        """Return what stands above a column."""
        return self.titles.get(column, str(column))

    @property
    def rows(self) -> list[list[Cell]]:
        """The cells that are shown, row by row."""
        records = self.frame.to_dict("records")
        return [[self._cell(record, column) for column in self.columns] for record in records]

    @property
    def numeric(self) -> list[bool]:
        """For each column that is shown whether it holds numbers and nothing else."""
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
    """The number by which it is sorted; None where it is sorted by its text."""


@dataclass(frozen=True)
class Chart:
    """A chart of Vega-Altair, as wide as the page."""

    chart: alt.TopLevelMixin
    """With ``width="container"``; made by :mod:`starmerge_models.study.page.charts`, for
    example."""
    caption: str
    description: str
    """What is to be seen, for who cannot see it."""


@dataclass(frozen=True)
class Copy:
    """A recipe or a command, with a button that copies it."""

    label: str
    text: str


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from: nested plain data, folded away."""

    content: Mapping[str, Any]
    label: str = "Provenance"

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Each value with its path of keys, such as ``models.star.path``."""
        return list(_flat("", self.content))


Part: TypeAlias = Text | Notes | KeyFigures | Table | Chart | Copy | Provenance


def _value(value: Any) -> Any:
    """Return a value as Python's own, None for NaN and what pandas holds for nothing."""
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
