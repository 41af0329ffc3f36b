"""The versions of what computes, for reports, cards and the keys of caches."""

from __future__ import annotations

from collections.abc import Iterable

__version__ = "0.1.0.dev0"
"""The version of starmerge. The build reads it here; changelog and CITATION.cff have the same."""


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of starmerge and of those of some packages that are installed.

    Args:
        packages: The names of distributions.

    Returns:
        Version by name; starmerge's own stands first, under ``starmerge``.
    """
    import importlib.metadata  # noqa: PLC0415  (slow to import)

    found = {"starmerge": __version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
