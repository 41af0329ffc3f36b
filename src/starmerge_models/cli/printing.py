"""Standard output of a command: text for people, or one JSON value for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer

AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON in place of text, and nothing else."),
]

_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)
"""Standard output, while all that is printed without a :class:`Printer` goes elsewhere."""


@contextmanager
def only_results() -> Iterator[None]:
    """Send to standard error what methods of users and libraries print, and results where they go.

    Programs that a library starts have the standard output of this process.
    """
    token = _RESULTS.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(token)


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
            content: Plain data without NaN and infinities; paths become text. Names of files that
                are no UTF-8 keep their bytes, as ``os.fsencode`` returns them.
        """
        if self.as_json:
            # Escapes stand for what the encoding of standard output lacks.
            text = json.dumps(content, indent=2, allow_nan=False, default=str)
            print(text, file=_RESULTS.get())
