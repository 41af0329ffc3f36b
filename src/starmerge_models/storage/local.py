"""The storage of local and mounted file systems."""

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
"""Age in nanoseconds from which a time stamp is reliable: some file systems have no finer time
stamps, so a file that changed more recently may change again with the same time stamp."""


class LocalStorage:
    """Files of the operating system, with memory mapping, prefetching and copies by the kernel."""

    is_mapped = True

    def exists(self, place: Path) -> bool:
        """Return whether anything lies there; False, too, if the system takes it for no path."""
        return _found(place.exists)

    def is_file(self, place: Path) -> bool:
        """Return whether the place is a file or a link to one."""
        return _found(place.is_file)

    def is_folder(self, place: Path) -> bool:
        """Return whether the place is a folder or a link to one."""
        return _found(place.is_dir)

    def names(self, folder: Path) -> list[str]:
        """List the names of the files directly in a folder, sorted."""
        return sorted(member.name for member in folder.iterdir() if member.is_file())

    def folders(self, folder: Path) -> list[str]:
        """List the names of the subfolders of a folder, sorted."""
        return sorted(member.name for member in folder.iterdir() if member.is_dir())

    def tree(self, folder: Path) -> list[str]:
        """List the files in a folder and its subfolders, relative to it, sorted."""
        return LocalFolder(folder).names()

    def real(self, place: Path) -> Path:
        """Return the path with all symbolic links resolved."""
        return place.resolve()

    def is_link(self, place: Path) -> bool:
        """Return whether the place is a symbolic link."""
        return place.is_symlink()

    def check_readable(self, place: Path) -> None:
        """Check that this user may read a file, or list a folder."""
        if not os.access(place, os.R_OK | (os.X_OK if place.is_dir() else 0)):
            raise StarmergeError(f"{place} may not be read by this user. Change its permissions.")

    def is_unchanged(self, file: Path, state: FileState) -> bool:
        """Return whether a file is still there and as it was."""
        try:
            return self.state(file).identity == state.identity
        except OSError:
            return False

    def state(self, file: Path) -> FileState:
        """Return the state of a file: device, inode, size, and the times of its last changes.

        The system sets ``ctime`` at every change of the content, and programs cannot set it back.
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
        """Open a regular file as an unbuffered stream.

        Pipes and devices are refused, because they may never end, and opening a pipe may block.

        Raises:
            FileNotFoundError: The file does not exist.
            StarmergeError: It is a folder, a pipe or a device, or cannot be opened.
        """
        return open_regular(file)

    def read(self, file: Path, offset: int, length: int) -> memoryview:
        """Return bytes of a file in a new buffer."""
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

        If the file is truncated while the mapping is read, the system kills the process.
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
        """Advise the system, if supported, that bytes will be read soon."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), file.open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def digest(self, file: Path, offset: int, length: int) -> None:
        """Return None: memory-mapped data is not hashed when it is read."""

    def copy(self, file: Path, start: int, length: int, target: OutputFile, offset: int) -> None:
        """Copy bytes of a file into an output, by the kernel if supported."""
        target.copy(file, start, length, offset)

    def check_output(self, place: Path, *, overwrite: bool, is_file: bool = False) -> None:
        """Check that a merge may be published there; see :func:`check_output`."""
        check = check_output_file if is_file else check_output
        check(place, overwrite=overwrite)

    def check_free_space(
        self, folder: Path, wanted: int, *, suffix: str | None = None, is_shared: bool = False
    ) -> None:
        """Check that the disk has enough space, including the files of an interrupted run."""
        partial = [left for left in leftovers(folder) if left.role == "partial"]
        own = [left.nbytes for left in partial if left.path.name.endswith(suffix or "")]
        held = max(own, default=0)
        check_space(folder, wanted - held)

    def describe_leftovers(self, folder: Path, *, suffix: str) -> list[str]:
        """Return a sentence on the size of other runs' hidden folders next to the output."""
        others = [left for left in leftovers(folder) if not left.path.name.endswith(suffix)]
        if not others:
            return []
        size = bytes_in_words(sum(leftover.nbytes for leftover in others))
        clean = shlex.join(["starmerge", "clean", str(others[0].path.parent)])
        return [f"earlier runs that were killed left {size} beside {folder}; see: {clean}"]

    def leftovers(self, output: Path) -> list[Leftover]:
        """List the hidden folders and files next to an output."""
        return leftovers(output)

    def delete_partial(self, folder: Path, *, suffix: str) -> None:
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
        """Yield a hidden folder next to the output; see :func:`output_folder`."""
        return output_folder(place, overwrite=overwrite, suffix=suffix, member=member)


LOCAL = LocalStorage()


def _found(look: Callable[[], bool]) -> bool:
    try:
        return look()
    except OSError:  # such as a name that is too long
        return False
