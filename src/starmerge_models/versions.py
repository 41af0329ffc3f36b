"""The versions of what computes, for reports, cards and the keys of caches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache

__version__ = "0.1.0.dev0"
"""The version of starmerge. The build reads it here; changelog and CITATION.cff have the same."""


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of starmerge and of those of some packages that are installed.

    Args:
        packages: The names of distributions.

    Returns:
        Version by name; starmerge's own stands first, under ``starmerge``.
    """
    found = {"starmerge": __version__}
    for name in packages:
        version = _version(name, tuple(sys.path))
        if version is not None:
            found[name] = version
    return found


@lru_cache(maxsize=64)
def _version(package: str, path: tuple[str, ...]) -> str | None:
    """Return the version of a package on a path, that of Python; None if it is not installed."""
    import importlib.metadata  # noqa: PLC0415  (slow to import)

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
