"""Renders a page, made of sections of parts, into one self-contained HTML file.

A content security policy with the hashes of the page's own scripts blocks the network and all other
scripts, so that even an unescaped name or model response could execute nothing.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from starmerge_models.errors import UsageError
from starmerge_models.storage.publishing import check_output_file, output_file
from starmerge_models.study.page.charts import specification
from starmerge_models.study.page.libraries import datatables, vega
from starmerge_models.study.page.parts import Chart, Part, Text


@dataclass(frozen=True)
class Section:
    """A heading and its content."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A report: a title, and sections with a table of contents."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def check_page(file: Path, *, overwrite: bool) -> None:
    """Make sure that a page may be written to ``file``; the caller checks before long work.

    Raises:
        UsageError: The name does not end in .html, or the path exists and may not be replaced.
    """
    if file.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{file}: a report is an HTML file, so its name ends in .html.")
    check_output_file(file, overwrite=overwrite)


def write_page(page: Page, file: Path, *, overwrite: bool = False) -> None:
    """Write a page atomically.

    Raises:
        UsageError: As for :func:`check_page`.
        StarmergeError: The disk is full, or fails otherwise.
    """
    check_page(file, overwrite=overwrite)
    text = html(page)
    with output_file(file, overwrite=overwrite) as partial:
        # File names may contain bytes that are not valid text.
        partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def html(page: Page) -> str:
    """Return a page as the text of an HTML file, about 1.6 MB of which are its libraries."""
    charts = [
        part for section in page.sections for part in section.parts if isinstance(part, Chart)
    ]
    scripts = [_script(vega()), _script(datatables() + "\n" + _asset("page.js"))]
    return _template().render(
        page=page,
        policy=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup(_asset("page.css")),
        charts=_json([specification(chart) for chart in charts]),
        numbers={id(chart): number for number, chart in enumerate(charts)},
        date=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
    )


def _kind(part: Part) -> str:
    """Return the name of a part's macro in the template."""
    return type(part).__name__


def _markdown(part: Text) -> Markup:
    """Return paragraphs as HTML; HTML in them is escaped."""
    reader = MarkdownIt("zero").enable(["emphasis", "backticks", "list", "newline"])
    return Markup(reader.render(part.markdown))


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = _kind
    environment.filters["identity"] = id
    environment.filters["markdown"] = _markdown
    return environment.from_string(_asset("page.html.j2"))


@cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _script(text: str) -> str:
    """Escape a script so that its text cannot end its script element."""
    return re.sub(r"<(?=/script|!--|script)", r"\\x3c", f"\n{text.strip()}\n", flags=re.IGNORECASE)


def _digest(script: str) -> str:
    return base64.b64encode(sha256(script.encode()).digest()).decode()


def _json(content: Any) -> Markup:
    """Return data as JSON for a script element, with HTML's special characters escaped."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)
