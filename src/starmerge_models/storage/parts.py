"""Multipart upload of a file to an object store."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import obstore

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART = 8 * 2**20
"""Least bytes of a part; S3 requires 5 MiB."""

_MOST_PARTS = 9_999
"""Most parts of a file, without a small last one; S3 and Google Cloud Storage allow 10,000."""


def goes_in_parts(size: int) -> bool:
    """Return whether a file of this size has at least two parts; otherwise one request sends it."""
    return size >= 2 * PART


def part_length(size: int) -> int:
    """Return the size of all parts but the last, for a file that is sent in parts."""
    return (size - 1) // min(size // PART, _MOST_PARTS)


class Parts:
    """A multipart upload that appears when it is completed, and is aborted after an error.

    Args:
        store: The bucket.
        key: The object.
        size: Size in bytes, at least two parts.
        at_once: Number of concurrent requests. With 1, each write waits for the part before, so
            that the store has all full parts when the last byte has been written.
    """

    def __init__(self, store: ObjectStore, key: str, size: int, *, at_once: int = 1) -> None:
        self.length = part_length(size)
        """Bytes of a part. The last part has at least one byte and at most as many bytes as there
        are parts, so that completing the upload sends little data."""
        self._writer: Any = obstore.open_writer(
            store, key, buffer_size=self.length, max_concurrency=at_once
        )
        self._is_complete = False

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_complete:
            with suppress(Exception):  # the store itself may have failed
                self._writer.__exit__(kind or RuntimeError, error, trace)

    def write(self, content: bytes | memoryview) -> None:
        """Send the next bytes."""
        self._writer.write(content)

    def complete(self) -> None:
        """Send the last bytes, wait for all parts, and make the object visible."""
        self._writer.close()
        self._is_complete = True
