"""Remote storages: one object for each kind of URL in a process."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

from starmerge_models.errors import StarmergeError
from starmerge_models.storage.storage import Storage


@cache
def remote_storage(scheme: str) -> Storage[Any]:
    """Return the storage for a scheme of URLs, which opens connections on first use.

    Args:
        scheme: One of :data:`~starmerge_models.storage.places.SCHEMES`.

    Raises:
        StarmergeError: The library for this scheme is not installed.
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
