"""Which tensor of the base an adapter's name means.

Adapters name a module by its path in the model they were trained in. The base's files may have been
saved from its inner model, or from a larger one around it: then all names differ by one prefix. And
transformers renames tensors of some architectures between the files and the model; it is asked for
the names where those of the files do not match.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from starmerge.checkpoints import renaming
from starmerge.checkpoints.base import Base
from starmerge.checkpoints.source import Source
from starmerge.errors import StarmergeError

Change = tuple[str, str]
"""A prefix to take away from an adapter's name, and one to put there instead."""

_NONE: Change = ("", "")

_PATIENCE = 120.0
"""Seconds that transformers gets to be imported and to lay out a model without weights."""


def match_names(source: Source, base: Base, names: Sequence[str]) -> dict[str, str]:
    """Find the base's tensors by the names that an adapter has for them.

    All names are changed by the same prefix, if by any. A name that fits as it stands needs no
    change; indices of layers are never part of a prefix.

    Args:
        source: The adapter.
        base: The base.
        names: Names of tensors in the model that the adapter was trained in.

    Returns:
        The base's name for each of ``names`` that is found under the best prefix.

    Raises:
        StarmergeError: Several prefixes fit all names.
    """
    found = match_stored(source, names, {name: name for name in base.checkpoint})
    if len(found) < len(names):
        in_model = match_stored(source, names, names_in_model(base))
        if len(in_model) > len(found):
            return in_model
    return found


def match_stored(source: Source, names: Sequence[str], stored: dict[str, str]) -> dict[str, str]:
    """Match ``names`` against the keys of ``stored``, return its values; see :func:`match_names`.

    Args:
        source: The adapter.
        names: Names of tensors in the model that the adapter was trained in.
        stored: Names to find them by.
    """
    longer = _longer_names(set(names), stored)
    votes = Counter(
        change for name in names for change in _fitting_changes(name, stored, longer[name])
    )
    if not votes:
        return {}
    most = max(votes.values())
    best = [change for change in votes if votes[change] == most]
    if _NONE in best:
        best = [_NONE]
    if len(best) > 1 and most == len(names):
        choices = " and ".join(_changed(names[0], change) for change in best[:2])
        raise StarmergeError(
            f"{source}: {names[0]} may mean {choices} of the base. Rename the adapter's tensors "
            "to the full names of the base's."
        )
    changed = {name: _changed(name, best[0]) for name in names}
    return {
        name: stored[other]
        for name, other in changed.items()
        if name.startswith(best[0][0]) and other in stored
    }


def completed(names: Sequence[str], found: Mapping[str, str]) -> dict[str, str]:
    """Return all names changed by the prefix by which some were found; as they are if none was.

    Args:
        names: An adapter's names.
        found: What :func:`match_stored` found of them.
    """
    change = prefix_change(*next(iter(found.items()), ("", "")))
    return {each: found.get(each, changed(each, change) or each) for each in names}


def prefix_change(name: str, stored: str) -> Change:
    """Return the prefixes of two names of one tensor, without the parts at the end they share."""
    common = 0
    for ours, theirs in zip(reversed(name.split(".")), reversed(stored.split(".")), strict=False):
        common += len(ours) + 1 if ours == theirs else 0
        if ours != theirs:
            break
    return name[: max(0, len(name) - common + 1)], stored[: max(0, len(stored) - common + 1)]


def changed(name: str, change: Change) -> str | None:
    """Return a name with its prefix changed; None if it has another prefix."""
    return _changed(name, change) if name.startswith(change[0]) else None


def _fitting_changes(name: str, stored: Collection[str], longer: Sequence[str]) -> Iterator[Change]:
    if name in stored:
        yield _NONE
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if parts[depth - 1].isdigit():
            break
        if ".".join(parts[depth:]) in stored:
            yield f"{'.'.join(parts[:depth])}.", ""
    for other in longer:
        yield "", other.removesuffix(name)


def _changed(name: str, change: Change) -> str:
    return change[1] + name.removeprefix(change[0])


def _longer_names(names: Collection[str], stored: Collection[str]) -> dict[str, list[str]]:
    """Return, for each name, the stored ones that end with it behind a prefix."""
    longer: dict[str, list[str]] = defaultdict(list)
    for other in stored:
        parts = other.split(".")
        for depth in range(1, len(parts)):
            if parts[depth - 1].isdigit():
                break
            end = ".".join(parts[depth:])
            if end in names:
                longer[end].append(other)
    return longer


def names_in_model(base: Base) -> dict[str, str]:
    """Return the base's tensors by the names they have once transformers has loaded them.

    Tensors that are joined or split on the way have no such name. Nothing is known, and the result
    is empty, where transformers is absent, or older than 5, or does not know the model.
    """
    if find_spec("transformers") is None:
        return {}
    config = json.dumps(base.config, sort_keys=True)
    return dict(_renamed(base.source.path, config, tuple(base.checkpoint)))


@lru_cache(maxsize=8)
def _renamed(folder: Path, config: str, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Ask transformers for names, in a process of its own.

    A config can make transformers loop for ever, or end the process. The result is kept for the
    other adapters of a merge.

    Args:
        folder: The base's.
        config: What its config says; by it, the result is known again.
        names: Of its tensors.
    """
    question = json.dumps([str(folder.absolute()), names])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        finished = subprocess.run(
            [sys.executable, "-m", renaming.__name__],
            input=question,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=_PATIENCE,
            check=True,
        )
        answer: list[tuple[str, str]] = json.loads(finished.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()
    return tuple((name, stored) for name, stored in answer)
