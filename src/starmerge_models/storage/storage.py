"""The interface of storages.

All packages above this one refer to a file or a folder by its place, read files by offset and
length, and publish whole folders. Only the storage knows how a place is accessed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from starmerge_models.storage.places import Place

Place_contra = TypeVar("Place_contra", contravariant=True)
"""The type of the places of a storage."""


MARK = "run.mark"
"""The name of the file in an output that identifies the run for other machines."""

Distribute: TypeAlias = Callable[[Callable[[int], None], Sequence[int]], Iterable[None]]
"""A function that runs picklable work on several machines. Its arguments are the work, a function
of item numbers from 0, and the memory of each item in bytes. It yields once per finished item, in
order.
"""


@dataclass(frozen=True)
class FileState:
    """The state of a file at one moment, without its content."""

    size: int
    """Size in bytes."""
    identity: tuple[int | str, ...]
    """Identifies the version of the file: it differs between files, and after every change."""
    is_settled: bool
    """Whether every later change will alter the identity. False for a file that changed so recently
    that the next change may get the same time stamp."""


class ShortFileError(OSError):
    """A file ends before the requested bytes."""


class PartialOutput(Protocol):
    """The files of a killed or running process for an output that is not published."""

    @property
    def path(self) -> Place:
        """Place of the files."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""

    @property
    def written(self) -> float:
        """Time of the last write, in seconds since the epoch."""

    def is_in_work(self) -> bool:
        """Whether the run still goes on; only processes of this machine are detected."""

    def is_only_copy(self) -> bool:
        """Whether it is a replaced output whose place is empty."""

    def delete(self) -> None:
        """Delete it.

        Raises:
            UsageError: The run still goes on.
            StarmergeError: The system or the store refuses to delete it.
        """


class OutputFile(Protocol):
    """A file of a known size that several threads write in any order."""

    def write(self, content: memoryview, offset: int, *, more: bool = False) -> None:
        """Write bytes at ``offset``.

        Args:
            content: The bytes.
            offset: Position of the first byte in the file.
            more: Whether this thread's next write continues at the end of this one. Only then may
                the storage buffer bytes.

        Raises:
            OSError: The storage failed, or is full.
        """

    def copy(self, source: Path, start: int, length: int, offset: int) -> None:
        """Copy ``length`` bytes of a local file to ``offset``.

        Raises:
            ShortFileError: The source ends early.
            OSError: The storage failed, or is full.
        """

    def read(self, offset: int, length: int) -> memoryview:
        """Return bytes of the file.

        Raises:
            ShortFileError: Some of them were not written.
            OSError: The storage failed.
        """

    def sync(self) -> None:
        """Sync all data of the file to the disk, also that of other processes.

        Raises:
            OSError: The storage failed, or is full.
        """

    def close(self) -> None:
        """Close the file."""


class OutputFolder(Protocol):
    """An output folder before publication, which is not visible under its final name.

    It can be pickled, and written by other processes with access to its storage. Names are relative
    to the folder, with slashes; subfolders are created as needed.
    """

    def shared(self) -> OutputFolder:
        """Return the folder for use by several machines at the same time.

        A write to its files has reached the storage when it returns, and does not touch adjacent
        bytes, which another machine may be writing.
        """

    def mark(self, text: str) -> Place:
        """Write a text to a file, by which other machines check that they see the same folder.

        Returns:
            The file, named :data:`MARK`.
        """

    @property
    def is_complete(self) -> bool:
        """Whether an earlier run had completed it, and was killed before publication."""

    def open(self, name: str, size: int) -> OutputFile:
        """Open a file for writing; data of an earlier run are kept.

        Args:
            name: The file, which is created if it does not exist.
            size: Size in bytes.
        """

    def put(self, name: str, content: bytes) -> None:
        """Write a small file at once."""

    def append(self, name: str, content: bytes) -> None:
        """Add bytes to the end of a file, and sync them to the disk."""

    def delete(self, name: str) -> None:
        """Delete a file or a folder with its content, if it exists."""

    def names(self) -> list[str]:
        """List the files, sorted."""

    def place(self, name: str) -> Place:
        """Return the place of a file or a folder, for reading."""


class Storage(Protocol[Place_contra]):
    """A storage of files.

    Every method raises a :class:`StarmergeError` if the storage cannot be reached or refuses the
    operation.
    """

    @property
    def is_mapped(self) -> bool:
        """Whether :meth:`window` maps files, so that the system can reclaim the memory."""

    def exists(self, place: Place_contra) -> bool:
        """Return whether the place exists."""

    def is_file(self, place: Place_contra) -> bool:
        """Return whether the place is a file or a link to one."""

    def is_folder(self, place: Place_contra) -> bool:
        """Return whether the place is a folder or a link to one."""

    def names(self, folder: Place_contra) -> list[str]:
        """List the names of the files directly in a folder, sorted."""

    def folders(self, folder: Place_contra) -> list[str]:
        """List the names of the subfolders of a folder, sorted."""

    def tree(self, folder: Place_contra) -> list[str]:
        """List the files in a folder and its subfolders, relative to it, sorted."""

    def real(self, place: Place_contra) -> Place:
        """Return the place with all symbolic links resolved, to compare places."""

    def is_link(self, place: Place_contra) -> bool:
        """Return whether the place is a symbolic link."""

    def check_readable(self, place: Place_contra) -> None:
        """Check, if possible without reading, that this user may read a file or folder.

        Raises:
            StarmergeError: The user may not read it.
        """

    def state(self, file: Place_contra) -> FileState:
        """Return the state of a file when this process opened it, or the present state.

        Raises:
            OSError: The file does not exist, or cannot be reached.
        """

    def is_unchanged(self, file: Place_contra, state: FileState) -> bool:
        """Return whether a file still exists and has the given state."""

    def stream(self, file: Place_contra) -> io.RawIOBase:
        """Open a file as an unbuffered stream.

        Raises:
            FileNotFoundError: The file does not exist.
            StarmergeError: It is not a file of bounded length.
        """

    def read(self, file: Place_contra, offset: int, length: int) -> memoryview:
        """Return bytes of a file in a new buffer.

        Raises:
            ShortFileError: It ends early.
            OSError: The storage failed.
        """

    def window(self, file: Place_contra, offset: int, length: int) -> memoryview:
        """Return a read-only window of a file's bytes, which may be loaded lazily.

        The caller must not write to it. Writes would not change the file.

        Raises:
            ShortFileError: It ends early.
            OSError: The storage failed.
        """

    def prefetch(self, file: Place_contra, offset: int, length: int) -> None:
        """Start to prefetch bytes that will be read soon, if supported; never fails."""

    def digest(self, file: Place_contra, offset: int, length: int) -> str | None:
        """Return the BLAKE3 of bytes that were just read, if the storage computed it, else None."""

    def copy(
        self, file: Place_contra, start: int, length: int, target: OutputFile, offset: int
    ) -> None:
        """Copy bytes of a file into an output, to ``offset``.

        Raises:
            ShortFileError: The file ends early.
            OSError: One of the storages failed.
        """

    def check_output(self, place: Place_contra, *, overwrite: bool, is_file: bool = False) -> None:
        """Check that a merge may be published there.

        Args:
            place: The output.
            overwrite: Whether it may replace an existing merge.
            is_file: Whether it is a single file instead of a folder.

        Raises:
            UsageError: It may not be published there.
        """

    def check_free_space(
        self,
        folder: Place_contra,
        wanted: int,
        *,
        suffix: str | None = None,
        is_shared: bool = False,
    ) -> None:
        """Check that there is enough free space for an output.

        Args:
            folder: The output.
            wanted: Size of the output in bytes.
            suffix: As for :meth:`publish`. The files of an interrupted run with the same suffix
                count as free space; None counts the files of all runs, while the suffix is unknown.
            is_shared: Whether several machines write the output.

        Raises:
            StarmergeError: There is less free space.
        """

    def describe_leftovers(self, folder: Place_contra, *, suffix: str) -> list[str]:
        """Return sentences on leftovers of killed runs that :meth:`publish` does not resume."""

    def leftovers(self, output: Place_contra) -> Sequence[PartialOutput]:
        """List the unpublished files of killed and running processes for an output."""

    def delete_partial(self, folder: Place_contra, *, suffix: str) -> None:
        """Delete the partial output of an interrupted run with the same suffix, if any.

        Raises:
            UsageError: The run still goes on.
        """

    def publish(
        self,
        place: Place_contra,
        *,
        overwrite: bool,
        suffix: str,
        member: str | None = None,
        progress: bool = False,
        distribute: Distribute | None = None,
    ) -> AbstractContextManager[OutputFolder]:
        """Yield a folder that is published under its final name after the block.

        Args:
            place: The final name.
            overwrite: Replace an existing merge.
            suffix: Identifies the partial output: that of an interrupted run with the same suffix
                is resumed.
            member: The only file of the folder to publish, as a file under the final name.
            progress: Show a progress bar if publishing takes long.
            distribute: Runs work on several machines; None uses this machine only.

        Raises:
            UsageError: The place is taken by something that may not be replaced, or another process
                is writing this output.
            StarmergeError: The storage is full, or fails otherwise.
        """
