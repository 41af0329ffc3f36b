"""A folder of this machine in the making, and its files."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from starmerge_models.storage.regular import named
from starmerge_models.storage.storage import MARK, OutputFolder, ShortFileError

_CHUNK = 64 * 2**20
"""Bytes copied between files at once."""

_PIECE = 2**20
"""Bytes copied at once where they pass through this process."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder that is filled, and gets its name at the end.

    Args:
        path: Where it lies meanwhile. Libraries that write files themselves may do so there.
        is_shared: Whether several machines fill its files together, which then lie on a network
            file system.
        is_complete: Whether an earlier run had filled it.
    """

    path: Path
    is_shared: bool = False
    is_complete: bool = False

    def shared(self) -> OutputFolder:
        """Return the same folder for machines that fill its files together."""
        return replace(self, is_shared=True)

    def mark(self, text: str) -> Path:
        """Leave a text in a file of its own; return the file."""
        self.delete(MARK)
        self.append(MARK, text.encode())
        return self.path / MARK

    def open(self, name: str, size: int) -> LocalFile:
        """Open a file to be filled; what an earlier run has left in it stays."""
        return LocalFile(self._path(name), size, synchronous=self.is_shared)

    def put(self, name: str, content: bytes) -> None:
        """Write a small file whole."""
        self._path(name).write_bytes(content)

    def append(self, name: str, content: bytes) -> None:
        """Add bytes to the end of a file, such that they survive a power cut."""
        stream = os.open(self._path(name), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(stream, left) :]
            os.fsync(stream)
        finally:
            os.close(stream)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it, if it is there."""
        place = self.path / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """List the files, sorted."""
        files = (member for member in self.path.rglob("*") if not member.is_dir())
        return sorted(file.relative_to(self.path).as_posix() for file in files)

    def place(self, name: str) -> Path:
        """Return where a file or a folder lies, to be read."""
        return self.path / name

    def _path(self, name: str) -> Path:
        """Return the path of a file in a folder that is there."""
        path = self.path / name
        if "/" in name:
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


class LocalFile:
    """A file that is filled in any order.

    Opened for synchronous writing (O_DSYNC), it lets several machines fill their own parts over a
    network file system. Otherwise Linux' NFS client reads the page around the end of a part, and
    later writes the whole page back (``nfs_can_extend_write``): what another machine has written
    into it meanwhile would be lost.

    Args:
        path: The file.
        size: Its bytes; None: as many as are written.
        synchronous: Whether what is written has reached the storage when the write returns.
    """

    def __init__(self, path: Path, size: int | None = None, *, synchronous: bool = False) -> None:
        self._synchronous = synchronous
        flags = os.O_CREAT | os.O_RDWR | (os.O_DSYNC if synchronous else 0)
        self._file = os.open(path, flags, 0o666)
        try:
            if size is not None and os.fstat(self._file).st_size != size:
                os.ftruncate(self._file, size)
        except BaseException:
            self.close()
            raise

    def write(self, content: memoryview, offset: int, *, more: bool = False) -> None:
        """Write bytes, the first of them at ``offset``; nothing is held back."""
        while content:
            count = os.pwrite(self._file, content, offset)
            content, offset = content[count:], offset + count

    def copy(self, source: Path, start: int, length: int, offset: int) -> None:
        """Copy bytes of another file, within the system where it can."""
        with source.open("rb", buffering=0) as stream:
            done = 0
            while done < length:
                count = min(length - done, _CHUNK)
                copied = self._copy_some(
                    source, stream.fileno(), start + done, count, offset + done
                )
                if not copied:
                    raise ShortFileError(f"{source} ends early")
                done += copied
        if self._synchronous:  # a copy within the system is none of the writes that wait
            self.sync()

    def _copy_some(self, path: Path, source: int, start: int, count: int, offset: int) -> int:
        """Copy up to ``count`` bytes; return how many."""
        if hasattr(os, "copy_file_range"):
            with contextlib.suppress(OSError):  # file systems that cannot, or not to each other
                copied = os.copy_file_range(source, self._file, count, start, offset)
                if copied:
                    return copied
        with named(path):
            content = os.pread(source, min(count, _PIECE), start)
        self.write(memoryview(content), offset)
        return len(content)

    def read(self, offset: int, length: int) -> memoryview:
        """Return bytes that lie in the file."""
        content = bytearray()
        while len(content) < length:
            part = os.pread(self._file, length - len(content), offset + len(content))
            if not part:
                raise ShortFileError("an output file is shorter than it was made")
            content += part
        return memoryview(content)

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        os.fsync(self._file)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)
