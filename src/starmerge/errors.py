"""The errors starmerge raises on purpose.

Each message says what is wrong, where (file, tensor or key), and what to do about it. The command
line prints the message alone; a traceback appears only with ``--debug``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StarmergeError(Exception):
    """A run could not be finished: a broken input, a full disk. Exit code 1."""


class UsageError(StarmergeError):
    """A run was asked for wrongly: an unknown parameter, a missing folder. Exit code 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the ``known`` names is meant by ``name``: `` Did you mean 'eta'?``.

    Returns a sentence to append to an error message; when nothing is near, the list of all names.
    """
    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=1)
    if matches:
        return f" Did you mean {matches[0]!r}?"
    return f" Known: {', '.join(known)}."
