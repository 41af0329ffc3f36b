"""The versions of what computes, for reports, cards and the keys of caches."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

DISTRIBUTION = "starmerge-models"
"""starmerge's name for installers: ``starmerge`` on PyPI is another project's."""


def own_version() -> str:
    """Return the version of the starmerge that is installed."""
    return importlib.metadata.version(DISTRIBUTION)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of starmerge and of those of some packages that are installed.

    Args:
        packages: The names of distributions.

    Returns:
        Version by name; starmerge's own stands first, under ``starmerge``.
    """
    found = {"starmerge": own_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
