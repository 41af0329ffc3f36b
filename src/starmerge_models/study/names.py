"""Names of models in titles."""

from __future__ import annotations

from pathlib import Path

from starmerge_models.checkpoints.source import resolve
from starmerge_models.storage import real


def model_name(reference: str | Path) -> str:
    """Return a model's display name: the last part of its Hub id or path.

    Args:
        reference: A folder, or a Hub id ``org/name`` or ``org/name@revision``.

    Raises:
        UsageError: There is no such folder, and it is no Hub id.
        StarmergeError: The Hub has no such repository, or cannot be reached.
    """
    source = resolve(reference)
    return (source.name or str(real(source.path))).rpartition("/")[2]
