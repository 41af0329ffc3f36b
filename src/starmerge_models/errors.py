"""The errors starmerge raises on purpose.

Each message says what is wrong, where (file, tensor or key), and what to do about it. The command
line prints the message alone; a traceback appears only with ``--debug``.
"""

from __future__ import annotations

import difflib
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class StarmergeError(Exception):
    """A run could not be finished: a broken input, a full disk. Exit code 1."""


class UsageError(StarmergeError):
    """A run was asked for wrongly: an unknown parameter, a missing folder. Exit code 2."""


class PiecesLostError(StarmergeError):
    """Somebody has deleted from a store what a merge had sent there: it must begin anew."""


class WorkersLostError(StarmergeError):
    """The machines that did the work are gone, and nothing is wrong with what they worked on.

    What they had written of an output is kept as after a kill: a later run goes on with it.
    """


class Interrupted(BaseException):
    """A signal has asked the command to end: SIGINT (Ctrl-C) or SIGTERM.

    No ``Exception``, as KeyboardInterrupt is none, so that no work goes on after it. Exit code 128
    and the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.kept: list[Path] = []
        """Partial outputs that a later run of the same command goes on with."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the ``known`` names is meant by ``name``: `` Did you mean 'eta'?``.

    Capital and small letters count as the same.

    Returns a sentence to append to an error message; when nothing is near, the list of all names.
    """
    known = sorted(known)
    matches = near(name, known)
    return f" Did you mean {matches[0]!r}?" if matches else f" Known: {', '.join(known)}."


def near(name: str, known: Iterable[str]) -> list[str]:
    """Return those of the ``known`` names that ``name`` may stand for, the likeliest first."""
    folded: dict[str, str] = {}
    for other in known:
        folded.setdefault(other.casefold(), other)
    return [folded[match] for match in difflib.get_close_matches(name.casefold(), folded)]


def explain(error: ValidationError, known: Iterable[str] = ()) -> str:
    """Return pydantic's findings as one line: ``eta: Input should be greater than 0 (got -1)``.

    What the alternatives of one value say is joined by "or".

    Args:
        error: The findings.
        known: Keys that may have been meant by unknown ones.
    """
    findings: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for finding in error.errors():
        parts = [str(part) for part in finding["loc"]]
        place = ".".join(part.rstrip("_") for part in parts if not _ALTERNATIVE.fullmatch(part))
        message = finding["msg"].removeprefix("Value error, ")
        if finding["type"] == "extra_forbidden" and known:
            message = f"the key {place!r} is unknown.{nearest(parts[-1], known)}"
            findings.setdefault("", []).append(message)
            continue
        if message not in findings.setdefault(place, []):
            findings[place].append(message)
        if finding["type"] != "missing" and not isinstance(finding["input"], dict | list):
            given[place] = f" (got {finding['input']!r})"
    return "; ".join(
        f"{place + ': ' if place else ''}{' or '.join(messages)}{given.get(place, '')}"
        for place, messages in findings.items()
    )


_ALTERNATIVE = re.compile(r"constrained-\w+|literal\[.*\]|number|list|patterns")
"""What pydantic puts into the place of a value that may have several types."""
