"""Safe opening of untrusted files: only regular files are accepted."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typing_extensions import Buffer

from starmerge_models.errors import StarmergeError

_PIECE = 2**20
"""Bytes of one read."""


class RegularFile(io.FileIO):
    """An unbuffered file for reading, without short reads, and with its name in errors.

    A single read of the system may return fewer bytes than requested before the end of the file.

    Args:
        descriptor: The open file.
        path: Its path.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor, "rb")
        self._path = path

    def read(self, size: int | None = -1, /) -> bytes:
        """Return ``size`` bytes, fewer only at the end of the file; all by default."""
        if size is None or size < 0:
            return self.readall()
        content = bytearray()
        with named(self._path):
            while part := super().read(min(_PIECE, size - len(content))):
                content += part
        return bytes(content)

    def readall(self) -> bytes:
        """Return all bytes up to the end."""
        with named(self._path):
            return super().readall()

    def readinto(self, buffer: Buffer, /) -> int:
        """Read into a buffer; return the number of bytes, 0 at the end."""
        with named(self._path):
            return super().readinto(buffer)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add a file's name to errors of the system that lack one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def open_regular(path: Path) -> RegularFile:
    """Open a regular file for unbuffered reading.

    Pipes and devices are refused, because they may never end, and opening a pipe may block.

    Raises:
        FileNotFoundError: The file does not exist.
        StarmergeError: It is a folder, a pipe or a device, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StarmergeError(f"{path} cannot be opened: {reason}. Give another file.") from error
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return RegularFile(descriptor, path)
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise StarmergeError(f"{path} is a folder. A file is wanted there.")
    raise StarmergeError(
        f"{path} is a pipe or a device, which may never end. Save its content as a file."
    )
