"""A local output folder before publication, and its files."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from starmerge_models.storage.regular import named
from starmerge_models.storage.storage import MARK, OutputFolder, ShortFileError

_CHUNK = 64 * 2**20
"""Bytes of one copy between files by the kernel."""

_PIECE = 2**20
"""Bytes of one copy through this process."""


@dataclass(frozen=True)
class LocalFolder:
    """An output folder under a temporary name, which is renamed when it is complete.

    Args:
        path: The temporary path. Libraries that write files themselves may write there.
        is_shared: Whether several machines write to its files over a network file system.
        is_complete: Whether an earlier run had completed it.
    """

    path: Path
    is_shared: bool = False
    is_complete: bool = False

    def shared(self) -> OutputFolder:
        """Return the folder for use by several machines at the same time."""
        return replace(self, is_shared=True)

    def mark(self, text: str) -> Path:
        """Write a text to the mark file; return the file."""
        self.delete(MARK)
        self.append(MARK, text.encode())
        return self.path / MARK

    def open(self, name: str, size: int) -> LocalFile:
        """Open a file for writing; data of an earlier run are kept."""
        return LocalFile(self._path(name), size, synchronous=self.is_shared)

    def put(self, name: str, content: bytes) -> None:
        """Write a small file at once."""
        self._path(name).write_bytes(content)

    def append(self, name: str, content: bytes) -> None:
        """Add bytes to the end of a file, and sync them to the disk."""
        stream = os.open(self._path(name), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(stream, left) :]
            os.fsync(stream)
        finally:
            os.close(stream)

    def delete(self, name: str) -> None:
        """Delete a file or a folder with its content, if it exists."""
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
        """Return the place of a file or a folder, for reading."""
        return self.path / name

    def _path(self, name: str) -> Path:
        """Return the path of a file, after creating its folder."""
        path = self.path / name
        if "/" in name:
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


class LocalFile:
    """A file that is written in any order.

    With synchronous writes (O_DSYNC), several machines can write their own parts over a network
    file system. Otherwise Linux' NFS client reads the page at the end of a part, and later writes
    the whole page back (``nfs_can_extend_write``), which would overwrite data of other machines.

    Args:
        path: The file.
        size: Size in bytes; None for the size of the written data.
        synchronous: Whether each write waits until the data has reached the storage.
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
        """Write bytes at ``offset``, without buffering."""
        while content:
            count = os.pwrite(self._file, content, offset)
            content, offset = content[count:], offset + count

    def copy(self, source: Path, start: int, length: int, offset: int) -> None:
        """Copy bytes of another file, by the kernel if supported."""
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
        if self._synchronous:  # O_DSYNC does not apply to copies by the kernel
            self.sync()

    def _copy_some(self, path: Path, source: int, start: int, count: int, offset: int) -> int:
        """Copy up to ``count`` bytes; return the number of copied bytes."""
        if hasattr(os, "copy_file_range"):
            with contextlib.suppress(OSError):  # not supported by or between the file systems
                copied = os.copy_file_range(source, self._file, count, start, offset)
                if copied:
                    return copied
        with named(path):
            content = os.pread(source, min(count, _PIECE), start)
        self.write(memoryview(content), offset)
        return len(content)

    def read(self, offset: int, length: int) -> memoryview:
        """Return bytes of the file."""
        content = bytearray()
        while len(content) < length:
            part = os.pread(self._file, length - len(content), offset + len(content))
            if not part:
                raise ShortFileError("an output file is shorter than it was made")
            content += part
        return memoryview(content)

    def sync(self) -> None:
        """Sync the written data to the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
