"""The versions of what computes, for reports, cards and the keys of caches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

__version__ = "0.1.0.dev0"
"""The version of starmerge. The build reads it here; changelog and CITATION.cff have the same."""


PathState = tuple[tuple[str, tuple[int, ...]], ...]
"""The folders of Python's path, each with its device, inode and time of last change."""


def path_state() -> PathState:
    """Return the state of Python's path, which changes with the packages that are installed.

    It is a key for what is known of them. A folder that does not exist has no numbers. What is
    edited in place, inside of an installed package's folder, does not change it.
    """
    return tuple(map(_state_of, sys.path))


def _state_of(folder: str) -> tuple[str, tuple[int, ...]]:
    with suppress(OSError, ValueError):
        state = Path(folder).stat()
        return folder, (state.st_dev, state.st_ino, state.st_mtime_ns)
    return folder, ()


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of starmerge and of those of some packages that are installed.

    Args:
        packages: The names of distributions.

    Returns:
        Version by name; starmerge's own stands first, under ``starmerge``.
    """
    found, path = {"starmerge": __version__}, path_state()
    for name in packages:
        version = _version(name, path)
        if version is not None:
            found[name] = version
    return found


@lru_cache(maxsize=64)
def _version(package: str, path: PathState) -> str | None:
    """Return the version of a package on Python's path; None if it is not installed."""
    import importlib.metadata  # noqa: PLC0415  (slow to import)

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
