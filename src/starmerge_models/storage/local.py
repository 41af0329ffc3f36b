"""This machine's file systems, and those that are mounted into them."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import shlex
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from starmerge_models.errors import StarmergeError
from starmerge_models.events import bytes_in_words
from starmerge_models.storage.leftovers import Leftover, leftovers
from starmerge_models.storage.local_folder import LocalFolder
from starmerge_models.storage.publishing import (
    check_output,
    check_output_file,
    check_space,
    output_folder,
)
from starmerge_models.storage.regular import named, open_regular
from starmerge_models.storage.storage import Distribute, FileState, OutputFile, ShortFileError

_SETTLED = 2 * 10**9
"""Nanoseconds. Some file systems stamp times no finer than that, so a file that changed less long
ago may change again and keep its stamp."""


class LocalStorage:
    """Files that the system opens: they are mapped, read ahead, and copied within the system."""

    is_mapped = True

    def exists(self, place: Path) -> bool:
        """Tell whether anything lies there; False, too, if the system takes it for no path."""
        return _found(place.exists)

    def is_file(self, place: Path) -> bool:
        """Tell whether a file lies there, or what a link to it leads to."""
        return _found(place.is_file)

    def is_folder(self, place: Path) -> bool:
        """Tell whether a folder lies there, or what a link to it leads to."""
        return _found(place.is_dir)

    def names(self, folder: Path) -> list[str]:
        """List the names of the files in a folder, not of those in its folders, sorted."""
        return sorted(member.name for member in folder.iterdir() if member.is_file())

    def folders(self, folder: Path) -> list[str]:
        """List the names of the folders in a folder, sorted."""
        return sorted(member.name for member in folder.iterdir() if member.is_dir())

    def tree(self, folder: Path) -> list[str]:
        """List the files in a folder and in its folders, relative to it, sorted."""
        return LocalFolder(folder).names()

    def real(self, place: Path) -> Path:
        """Return the path that is meant, all links followed."""
        return place.resolve()

    def is_link(self, place: Path) -> bool:
        """Tell whether a link lies there."""
        return place.is_symlink()

    def check_readable(self, place: Path) -> None:
        """Make sure that this user may read a file, or list a folder."""
        if not os.access(place, os.R_OK | (os.X_OK if place.is_dir() else 0)):
            raise StarmergeError(f"{place} may not be read by this user. Change its permissions.")

    def is_unchanged(self, file: Path, state: FileState) -> bool:
        """Tell whether a file is still there and as it was."""
        try:
            return self.state(file).identity == state.identity
        except OSError:
            return False

    def state(self, file: Path) -> FileState:
        """Return the state of a file: device, inode, size, and the times of its last changes.

        The system stamps every change of the content, and nobody can set the time of that stamp,
        ``ctime``, back.
        """
        found = file.stat()
        changed = max(found.st_mtime_ns, found.st_ctime_ns)
        identity = (
            found.st_dev,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
        )
        return FileState(found.st_size, identity, changed < time.time_ns() - _SETTLED)

    def stream(self, file: Path) -> io.FileIO:
        """Open a file as a stream, unbuffered, if it is a regular one.

        A pipe or a device may never end, and opening a pipe may wait for ever.

        Raises:
            FileNotFoundError: There is no such file.
            StarmergeError: It is a folder, a pipe or a device, or cannot be opened.
        """
        return open_regular(file)

    def read(self, file: Path, offset: int, length: int) -> memoryview:
        """Return bytes of a file, in memory of their own."""
        content = memoryview(bytearray(length))
        with named(file), file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            left = content
            while left:
                count = stream.readinto(left)
                if not count:
                    raise ShortFileError(f"{file} ends early")
                left = left[count:]
        return content

    def window(self, file: Path, offset: int, length: int) -> memoryview:
        """Map bytes of a file into memory, privately.

        If the file is cut off while they are looked at, the system ends the process.
        """
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        with named(file), file.open("rb", buffering=0) as stream:
            try:
                mapped = mmap.mmap(
                    stream.fileno(),
                    offset + length - start,
                    access=mmap.ACCESS_COPY,
                    offset=start,
                )
            except ValueError as error:  # the file has become shorter
                raise ShortFileError(f"{file} ends early") from error
        return memoryview(mapped)[offset - start :]

    def prefetch(self, file: Path, offset: int, length: int) -> None:
        """Tell the system, where it can be told, that bytes will soon be read."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), file.open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def digest(self, file: Path, offset: int, length: int) -> None:
        """Return None: what is mapped is read when it is looked at."""

    def copy(self, file: Path, start: int, length: int, target: OutputFile, offset: int) -> None:
        """Copy bytes of a file into an output, within the system where it can."""
        target.copy(file, start, length, offset)

    def check_output(self, place: Path, *, overwrite: bool, is_file: bool = False) -> None:
        """Make sure that a merge may be published there; see :func:`check_output`."""
        check = check_output_file if is_file else check_output
        check(place, overwrite=overwrite)

    def check_room(
        self, folder: Path, wanted: int, *, suffix: str | None = None, is_shared: bool = False
    ) -> None:
        """Make sure that the disk has room, with what an interrupted run has left."""
        partial = [left for left in leftovers(folder) if left.role == "partial"]
        own = [left.nbytes for left in partial if left.path.name.endswith(suffix or "")]
        held = max(own, default=0)
        check_space(folder, wanted - held)

    def remains(self, folder: Path, *, suffix: str) -> list[str]:
        """Say how much lies in hidden folders of other runs, beside the output."""
        others = [left for left in leftovers(folder) if not left.path.name.endswith(suffix)]
        if not others:
            return []
        size = bytes_in_words(sum(leftover.nbytes for leftover in others))
        clean = shlex.join(["starmerge", "clean", str(others[0].path.parent)])
        return [f"earlier runs that were killed left {size} beside {folder}; see: {clean}"]

    def leftovers(self, output: Path) -> list[Leftover]:
        """List the hidden folders and files beside an output."""
        return leftovers(output)

    def forget(self, folder: Path, *, suffix: str) -> None:
        """Delete the hidden folder of an interrupted run with the same suffix."""
        for leftover in leftovers(folder):
            if leftover.role == "partial" and leftover.path.name.endswith(suffix):
                leftover.delete()

    def publish(
        self,
        place: Path,
        *,
        overwrite: bool,
        suffix: str,
        member: str | None = None,
        progress: bool = False,
        distribute: Distribute | None = None,
    ) -> AbstractContextManager[LocalFolder]:
        """Yield a hidden folder beside the output; see :func:`output_folder`."""
        return output_folder(place, overwrite=overwrite, suffix=suffix, member=member)


LOCAL = LocalStorage()


def _found(look: Callable[[], bool]) -> bool:
    try:
        return look()
    except OSError:  # such as a name that is too long
        return False
