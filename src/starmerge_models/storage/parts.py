"""A file sent to an object store in parts."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import obstore

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART = 8 * 2**20
"""Bytes of a part, at least; S3 wants 5 MiB."""

_MOST_PARTS = 9_999
"""Of one file, besides a last one of a few bytes; S3 and Google Cloud Storage allow 10,000."""


def goes_in_parts(size: int) -> bool:
    """Tell whether a file of this size has two parts at least; else it is sent at once."""
    return size >= 2 * PART


def part_length(size: int) -> int:
    """Return the bytes of the parts, but the last, of a file that goes in parts."""
    return (size - 1) // min(size // PART, _MOST_PARTS)


class Parts:
    """A file that is sent in parts and appears when it is completed; else it is taken back.

    Args:
        store: The bucket.
        key: The object.
        size: Its bytes, two parts at least.
        at_once: Parts that are under way together. With one, what is written waits until the part
            before it is there: when the rest has been written, the store has all full parts.
    """

    def __init__(self, store: ObjectStore, key: str, size: int, *, at_once: int = 1) -> None:
        self.length = part_length(size)
        """Bytes of a part. After the last full one at least a byte is left, and at most as many as
        there are parts: little has to be sent when the file is completed."""
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
            with suppress(Exception):  # the store may be the reason
                self._writer.__exit__(kind or RuntimeError, error, trace)

    def write(self, content: bytes | memoryview) -> None:
        """Send what follows."""
        self._writer.write(content)

    def complete(self) -> None:
        """Send the last bytes, wait for all, and make the object visible."""
        self._writer.close()
        self._is_complete = True
