"""Standard output of a command: text for people, or one JSON value for programs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON in place of text, and nothing else."),
]


class Printer:
    """Standard output of a command, as ``--json`` wants it.

    Args:
        as_json: Whether the command was given ``--json``.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def text(self, *lines: str) -> None:
        """Print lines for people; with ``--json``, nothing."""
        if not self.as_json:
            print("\n".join(lines))

    def result(self, content: Any) -> None:
        """Print the result with ``--json``; otherwise nothing.

        Args:
            content: Plain data without NaN and infinities; paths become text.
        """
        if self.as_json:
            print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=str))
