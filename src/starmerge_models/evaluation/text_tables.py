"""Tables of text cells: Markdown for terminals and files, HTML for notebooks."""

from __future__ import annotations

from collections.abc import Sequence

from starmerge_models.evaluation.scoring.comparison import Interval


def interval_cell(interval: Interval | None) -> str:
    """Return an average with its interval as text; "–" for None."""
    if interval is None:
        return "–"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns; the first row is the header."""
    rows = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def html_table(rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return an HTML table in pandas' style; the first row is the header.

    Args:
        rows: The cells.
        caption: A line of text above the table.
    """
    import html  # noqa: PLC0415  (only where a notebook shows something)

    import pandas as pd  # noqa: PLC0415

    head, *body = rows
    drawn: str = pd.DataFrame(body, columns=list(head)).to_html(index=False)
    return f"<p>{html.escape(caption)}</p>\n{drawn}" if caption else drawn
