"""Storages that are reached over the network: one for each kind of URL and process."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

from starmerge_models.errors import StarmergeError
from starmerge_models.storage.storage import Storage


@cache
def remote_storage(scheme: str) -> Storage[Any]:
    """Return the storage of a kind of URL, which opens connections when it is first used.

    Args:
        scheme: One of :data:`~starmerge_models.storage.places.SCHEMES`.

    Raises:
        StarmergeError: The library that reaches it is not installed.
    """
    if scheme == "hf":
        from starmerge_models.storage.hub import HubStorage  # noqa: PLC0415  (slow to import)

        return HubStorage()
    if find_spec("obstore") is None or find_spec("platformdirs") is None:
        raise StarmergeError(
            f"{scheme}:// URLs are read and written by the extra 'remote'. Install it: "
            "pip install 'starmerge-models[remote]'."
        )
    from starmerge_models.storage.objects import ObjectStorage  # noqa: PLC0415  (an extra)

    return ObjectStorage()
