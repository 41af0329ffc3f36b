"""The seam between what is merged and where its bytes lie.

Everything above this package names a file or a folder by its place, reads a file by offset and
length, and publishes whole folders. What lies under a place is known to its storage alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from starmerge_models.storage.places import Place

Where_contra = TypeVar("Where_contra", contravariant=True)
"""The kind of places that a storage has."""


MARK = "run.mark"
"""The name of the file in an output that tells machines which run fills it."""

Distribute: TypeAlias = Callable[[Callable[[int], None], Sequence[int]], Iterable[None]]
"""Has several machines do some work, which can be pickled, for the numbers from 0. It is told how
many bytes of memory the work takes for each number, and yields, in their order, as they are done.
"""


@dataclass(frozen=True)
class FileState:
    """A file as it is at one moment, without its content."""

    size: int
    """Bytes."""
    identity: tuple[int | str, ...]
    """Differs from that of any other file, and from the file's own after its content changed."""
    is_settled: bool
    """Whether any later change must alter the identity: False of a file that changed so lately that
    the system's clock may stamp the next change alike."""


class ShortFileError(OSError):
    """A file ends before the bytes that were asked for."""


class LeftBehind(Protocol):
    """What a run of an output has left that was killed, or writes that still goes on."""

    @property
    def path(self) -> Place:
        """Where it lies."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

    @property
    def written(self) -> float:
        """When something in it was last written, seconds since the epoch."""

    def is_in_work(self) -> bool:
        """Whether the run still goes on, as far as this machine can tell."""

    def is_only_copy(self) -> bool:
        """Whether it was replaced, and nothing stands in its place."""

    def delete(self) -> None:
        """Delete it.

        Raises:
            UsageError: The run still goes on.
            StarmergeError: The system or the store refuses.
        """


class OutputFile(Protocol):
    """A file of a known size that is filled in any order, by several threads."""

    def write(self, content: memoryview, offset: int, *, more: bool = False) -> None:
        """Write bytes, the first of them at ``offset``.

        Args:
            content: The bytes.
            offset: Of the first in the file.
            more: Whether this thread will write those that follow next. Only then may some be held
                back, to be written together.

        Raises:
            OSError: The storage failed, or is full.
        """

    def copy(self, source: Path, start: int, length: int, offset: int) -> None:
        """Copy ``length`` bytes of a file of this machine, the first of them to ``offset``.

        Raises:
            ShortFileError: The source ends early.
            OSError: The storage failed, or is full.
        """

    def read(self, offset: int, length: int) -> memoryview:
        """Return bytes that lie in the file.

        Raises:
            ShortFileError: Some of them do not.
            OSError: The storage failed.
        """

    def sync(self) -> None:
        """Make all that lies in the file, whoever wrote it, survive a power cut.

        Raises:
            OSError: The storage failed, or is full.
        """

    def close(self) -> None:
        """Let go of the file."""


class OutputFolder(Protocol):
    """A folder in the making, which nobody sees under its name before it is published.

    It can be pickled, and filled by other processes that reach its storage. Names are relative to
    it, with slashes between folders, which are made as they are needed.
    """

    def shared(self) -> OutputFolder:
        """Return the same folder for machines that fill its files together.

        Of files that are opened through it, what one of them writes has reached the storage when
        the write returns, and changes no byte beside, which another may be writing.
        """

    def mark(self, text: str) -> Place:
        """Leave a text, by which other machines know that they see this folder, in a file.

        Returns:
            The file, which is called :data:`MARK`.
        """

    @property
    def is_complete(self) -> bool:
        """Whether an earlier run had filled it, and was killed before it was published."""

    def open(self, name: str, size: int) -> OutputFile:
        """Open a file to be filled; what an earlier run has left in it stays.

        Args:
            name: The file, which is made if it is not there.
            size: Its bytes.
        """

    def put(self, name: str, content: bytes) -> None:
        """Write a small file whole."""

    def append(self, name: str, content: bytes) -> None:
        """Add bytes to the end of a file, such that they survive a power cut."""

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it, if it is there."""

    def names(self) -> list[str]:
        """List the files, sorted."""

    def place(self, name: str) -> Place:
        """Return where a file or a folder lies, to be read."""


class Storage(Protocol[Where_contra]):
    """A kind of place where files lie.

    Any method raises a :class:`StarmergeError` where the storage cannot be reached or refuses.
    """

    @property
    def is_mapped(self) -> bool:
        """Whether :meth:`window` takes no memory that the system could not have back."""

    def exists(self, place: Where_contra) -> bool:
        """Tell whether anything lies there."""

    def is_file(self, place: Where_contra) -> bool:
        """Tell whether a file lies there, or what a link to it leads to."""

    def is_folder(self, place: Where_contra) -> bool:
        """Tell whether a folder lies there, or what a link to it leads to."""

    def names(self, folder: Where_contra) -> list[str]:
        """List the names of the files in a folder, not of those in its folders, sorted."""

    def folders(self, folder: Where_contra) -> list[str]:
        """List the names of the folders in a folder, sorted."""

    def tree(self, folder: Where_contra) -> list[str]:
        """List the files in a folder and in its folders, relative to it, sorted."""

    def real(self, place: Where_contra) -> Place:
        """Return the place that is meant, all links followed: two that are equal are one."""

    def is_link(self, place: Where_contra) -> bool:
        """Tell whether a link lies there."""

    def check_readable(self, place: Where_contra) -> None:
        """Make sure that this user may read a file, or what lies in a folder, where that is known.

        Raises:
            StarmergeError: The user may not.
        """

    def state(self, file: Where_contra) -> FileState:
        """Return the state of a file, as it was when this process opened it or as it is now.

        Raises:
            OSError: It is not there, or cannot be reached.
        """

    def is_unchanged(self, file: Where_contra, state: FileState) -> bool:
        """Tell whether a file is still there and as it was."""

    def stream(self, file: Where_contra) -> io.RawIOBase:
        """Open a file for readers that want a stream with a position, unbuffered.

        Raises:
            FileNotFoundError: There is no such file.
            StarmergeError: No file of a bounded length lies there.
        """

    def read(self, file: Where_contra, offset: int, length: int) -> memoryview:
        """Return bytes of a file, in memory of their own.

        Raises:
            ShortFileError: It ends early.
            OSError: The storage failed.
        """

    def window(self, file: Where_contra, offset: int, length: int) -> memoryview:
        """Return bytes of a file that need not be in memory before they are looked at.

        They must not be written to. Writing to them does not change the file.

        Raises:
            ShortFileError: It ends early.
            OSError: The storage failed.
        """

    def prefetch(self, file: Where_contra, offset: int, length: int) -> None:
        """Begin to fetch bytes that will soon be read, where that helps; never fails."""

    def digest(self, file: Where_contra, offset: int, length: int) -> str | None:
        """Return the BLAKE3 of bytes that were just read, if it was taken meanwhile, else None."""

    def copy(
        self, file: Where_contra, start: int, length: int, target: OutputFile, offset: int
    ) -> None:
        """Copy bytes of a file into an output, the first of them to ``offset``.

        Raises:
            ShortFileError: The file ends early.
            OSError: One of the storages failed.
        """

    def check_output(self, place: Where_contra, *, overwrite: bool, is_file: bool = False) -> None:
        """Make sure that a merge may be published there.

        Args:
            place: The output.
            overwrite: Whether it may replace what stands there.
            is_file: Whether it is one file, and not a folder.

        Raises:
            UsageError: It may not.
        """

    def check_room(
        self,
        folder: Where_contra,
        wanted: int,
        *,
        suffix: str | None = None,
        is_shared: bool = False,
    ) -> None:
        """Make sure that there is room for an output.

        Args:
            folder: The output.
            wanted: Its bytes.
            suffix: As for :meth:`publish`: what an interrupted run with the same has left counts
                as room; None: what any has left, as long as the suffix is not known.
            is_shared: Whether several machines fill it.

        Raises:
            StarmergeError: There is less.
        """

    def remains(self, folder: Where_contra, *, suffix: str) -> list[str]:
        """Return sentences on what killed runs have left that :meth:`publish` does not take up."""

    def leftovers(self, output: Where_contra) -> Sequence[LeftBehind]:
        """List what runs of an output have left that were killed, or still go on."""

    def forget(self, folder: Where_contra, *, suffix: str) -> None:
        """Delete what an interrupted run with the same suffix has left, if anything.

        Raises:
            UsageError: The run is not over.
        """

    def publish(
        self,
        place: Where_contra,
        *,
        overwrite: bool,
        suffix: str,
        member: str | None = None,
        progress: bool = False,
        distribute: Distribute | None = None,
    ) -> AbstractContextManager[OutputFolder]:
        """Yield a folder that appears under its name, whole, when the block ends well.

        Args:
            place: The name.
            overwrite: Replace the merge that stands there.
            suffix: Decides what is taken up of an interrupted run: what it made with the same.
            member: A file of the folder that alone appears under the name, as a file.
            progress: Show a progress bar where publishing takes long.
            distribute: Has several machines do what can be done by them; None: there is this one.

        Raises:
            UsageError: Something that may not be replaced stands there, or another process is
                making this output.
            StarmergeError: The storage is full, or fails otherwise.
        """
