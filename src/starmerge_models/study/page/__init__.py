"""Report pages: self-contained HTML files with charts, sortable tables and commands to copy."""

from starmerge_models.study.page.page import Page, Section, check_page, write_page
from starmerge_models.study.page.parts import (
    Chart,
    Copy,
    KeyFigure,
    KeyFigures,
    Notes,
    Part,
    Provenance,
    Table,
    Text,
)

__all__ = [
    "Chart",
    "Copy",
    "KeyFigure",
    "KeyFigures",
    "Notes",
    "Page",
    "Part",
    "Provenance",
    "Section",
    "Table",
    "Text",
    "check_page",
    "write_page",
]
