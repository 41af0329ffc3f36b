"""The exception classes of starmerge.

Each message states the problem, its place (file, tensor or key), and a remedy. The command line
prints only the message; ``--debug`` adds the traceback.
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
    """A run could not be finished, for example because of a broken input or a full disk.

    The command line exits with code 1.
    """


class UsageError(StarmergeError):
    """A request is invalid, for example because of an unknown parameter or a missing folder.

    The command line exits with code 2.
    """


class PiecesLostError(StarmergeError):
    """Parts of a merge's output were deleted from the object store, so the merge must restart."""


class WorkersLostError(StarmergeError):
    """All workers of the cluster are lost, for reasons unrelated to the work itself.

    The partial output is kept, as after a kill, and a later run resumes it.
    """


class Interrupted(BaseException):
    """The command received SIGINT (Ctrl-C) or SIGTERM.

    Like KeyboardInterrupt it does not derive from ``Exception``, so that no handler of errors
    continues the work. The command line exits with code 128 plus the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.kept: list[Path] = []
        """Partial outputs that a later run of the same command resumes."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for a misspelt name, such as `` Did you mean 'eta'?``.

    The comparison ignores case. The result is a sentence to append to an error message; without a
    close match it lists all ``known`` names.
    """
    known = sorted(known)
    matches = near(name, known)
    return f" Did you mean {matches[0]!r}?" if matches else f" Known: {', '.join(known)}."


def near(name: str, known: Iterable[str]) -> list[str]:
    """Return the ``known`` names that are close to ``name``, the closest first."""
    folded: dict[str, str] = {}
    for other in known:
        folded.setdefault(other.casefold(), other)
    return [folded[match] for match in difflib.get_close_matches(name.casefold(), folded)]


def explain(error: ValidationError, known: Iterable[str] = ()) -> str:
    """Return a validation error as one line: ``eta: Input should be greater than 0 (got -1)``.

    The messages of a union's alternatives are joined by "or".

    Args:
        error: The error.
        known: Valid keys, for suggestions about unknown keys.
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
"""Components that pydantic adds to the location of a value of a union type."""
