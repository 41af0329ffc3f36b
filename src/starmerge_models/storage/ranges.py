"""Reading of remote files by range requests, for all kinds of remote stores.

No file is downloaded whole: headers are read in blocks of increasing size, tensors in concurrent
ranges of some megabytes. Announced tensors are prefetched in the background, into a bounded amount
of memory.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

from blake3 import blake3

from starmerge_models.errors import StarmergeError
from starmerge_models.storage.places import RemotePlace
from starmerge_models.storage.storage import FileState, OutputFile, ShortFileError

RANGE = 16 * 2**20
"""Most bytes of one request."""

AT_ONCE = 8
"""Concurrent requests of a process for ranges of tensors."""

AHEAD = 512 * 2**20
"""Most bytes that are prefetched and not yet read."""

_AHEAD_AT_ONCE = 4
"""Number of announced tensors that are prefetched at the same time."""

_FORGOTTEN = 60.0
"""Seconds after which prefetched data that was never read may be discarded."""

CUT_OFF = "the answer ended early"
"""Reason for repeating a request that the library considers successful."""

_FIRST_BLOCK = 64 * 2**10
"""Bytes of a stream's first block; each consecutive block is twice as long."""

_LISTED = 30.0
"""Seconds for which the list of a folder's members is cached: opening a model tests dozens of
files, most of which do not exist."""


class Backend(Protocol):
    """A thread-safe client for a kind of URL."""

    def stat(self, file: RemotePlace) -> FileState:
        """Return the state of a file.

        Raises:
            FileNotFoundError: The file does not exist.
            StarmergeError: The store refuses the request, or cannot be reached.
        """

    def fetch(self, file: RemotePlace, state: FileState, start: int, stop: int) -> Any:
        """Return the bytes from ``start`` to ``stop`` of a file, as a buffer of that length.

        Raises:
            ShortFileError: The file ends early.
            StarmergeError: The file has changed since ``state``, or the store refuses the request
                or cannot be reached.
        """

    def members(self, folder: RemotePlace) -> tuple[list[str], list[str]]:
        """Return the names of a folder's files, and of its subfolders; none if it does not exist.

        Raises:
            StarmergeError: The store refuses, or cannot be reached.
        """

    def tree(self, folder: RemotePlace) -> dict[str, int]:
        """Return the sizes of all files in a folder and its folders, by their relative names.

        Raises:
            StarmergeError: The store refuses, or cannot be reached.
        """


@dataclass
class _Announced:
    content: Future[memoryview]
    nbytes: int
    since: float = field(default_factory=time.monotonic)


class Ranges:
    """The reading half of a remote storage.

    A file is pinned to its version when it is opened: later reads request that version, and fail if
    the file has been replaced.

    Args:
        backend: The client of the store.
    """

    is_mapped = False

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = Lock()
        self._pinned: dict[RemotePlace, FileState] = {}
        self._listed: dict[RemotePlace, tuple[float, list[str], list[str]]] = {}
        self._announced: dict[tuple[RemotePlace, int, int], _Announced] = {}
        self._digests: dict[tuple[RemotePlace, int, int], str] = {}
        self._parts = ThreadPoolExecutor(AT_ONCE, "ranges")
        self._background = ThreadPoolExecutor(_AHEAD_AT_ONCE, "ranges-ahead")

    def exists(self, place: RemotePlace) -> bool:
        """Return whether a file or a folder lies there."""
        return self.is_folder(place) or self.is_file(place)

    def is_file(self, place: RemotePlace) -> bool:
        """Return whether a file lies there."""
        if not place.path:
            return False
        known = self._known_members(place.parent)
        if known is not None:
            return place.name in known[0]
        try:
            self._backend.stat(place)
        except FileNotFoundError:
            return False
        return True

    def is_folder(self, place: RemotePlace) -> bool:
        """Return whether there are files below the place; stores have no empty folders."""
        return any(self._members(place))

    def names(self, folder: RemotePlace) -> list[str]:
        """List the names of the files directly in a folder, sorted."""
        return sorted(self._members(folder)[0])

    def folders(self, folder: RemotePlace) -> list[str]:
        """List the names of the subfolders of a folder, sorted."""
        return sorted(self._members(folder)[1])

    def tree(self, folder: RemotePlace) -> list[str]:
        """List the files in a folder and its subfolders, relative to it, sorted."""
        return sorted(self._backend.tree(folder))

    def real(self, place: RemotePlace) -> RemotePlace:
        """Return the place itself: stores have no links."""
        return place

    def is_link(self, place: RemotePlace) -> bool:
        """Return False: stores have no links."""
        return False

    def check_readable(self, place: RemotePlace) -> None:
        """Do nothing: a store reports missing permissions when bytes are read."""

    def state(self, file: RemotePlace) -> FileState:
        """Return the state of a file when this process opened it, or the present state."""
        with self._lock:
            known = self._pinned.get(file)
        return known or self._pin(file)

    def is_unchanged(self, file: RemotePlace, state: FileState) -> bool:
        """Return whether a file still has the given state, by a new request."""
        try:
            return self._backend.stat(file).identity == state.identity
        except FileNotFoundError:
            return False

    def stream(self, file: RemotePlace) -> io.RawIOBase:
        """Open the present version of a file as a stream that fetches blocks."""
        return _Stream(self._backend, file, self._pin(file))

    def read(self, file: RemotePlace, offset: int, length: int) -> memoryview:
        """Return bytes of a file, fetched now or prefetched before."""
        key = file, offset, length
        with self._lock:
            announced = self._announced.pop(key, None)
        if announced is not None:
            try:
                return announced.content.result()
            except Exception:  # fetch again, to raise the error in this thread
                pass
        return self._fetch(file, offset, length)

    window = read

    def prefetch(self, file: RemotePlace, offset: int, length: int) -> None:
        """Start to prefetch bytes in the background, if memory permits; never fails."""
        key, now = (file, offset, length), time.monotonic()
        with self._lock:
            if key in self._announced:
                return
            held = sum(own.nbytes for own in self._announced.values())
            for old, own in list(self._announced.items()):
                if held + length <= AHEAD:
                    break
                if own.content.done() and now - own.since > _FORGOTTEN:
                    held -= self._announced.pop(old).nbytes
            if held + length > AHEAD:
                return
            future = self._background.submit(self._fetch, file, offset, length)
            self._announced[key] = _Announced(future, length)

    def digest(self, file: RemotePlace, offset: int, length: int) -> str | None:
        """Return the BLAKE3 of bytes that were just read, once, so that they are not read again."""
        with self._lock:
            return self._digests.pop((file, offset, length), None)

    def copy(
        self, file: RemotePlace, start: int, length: int, target: OutputFile, offset: int
    ) -> None:
        """Copy bytes of a file into an output, in chunks."""
        for begin in range(0, length, RANGE):
            count = min(RANGE, length - begin)
            target.write(self._fetch(file, start + begin, count), offset + begin)

    def _fetch(self, file: RemotePlace, offset: int, length: int) -> memoryview:
        """Return bytes of a file in a new buffer, and cache their hash."""
        state = self.state(file)
        if offset + length > state.size:
            raise ShortFileError(f"{file} ends early")
        content = memoryview(bytearray(length))
        starts = range(0, length, RANGE)

        def fetch(start: int) -> None:
            stop = min(start + RANGE, length)
            found = self._backend.fetch(file, state, offset + start, offset + stop)
            content[start:stop] = memoryview(found).cast("B")

        if len(starts) == 1:
            fetch(0)
        else:
            for _ in self._parts.map(fetch, starts):
                pass
        digest = blake3(content, max_threads=1).hexdigest()
        with self._lock:
            self._digests[file, offset, length] = digest
        return content

    def _pin(self, file: RemotePlace) -> FileState:
        state = self._backend.stat(file)
        with self._lock:
            known = self._pinned.get(file)
            self._pinned[file] = state
            if known is not None and known.identity != state.identity:
                for held in (self._announced, self._digests):
                    for key in [key for key in held if key[0] == file]:
                        del held[key]
        return state

    def _members(self, folder: RemotePlace) -> tuple[Sequence[str], Sequence[str]]:
        known = self._known_members(folder)
        if known is not None:
            return known
        files, folders = self._backend.members(folder)
        with self._lock:
            self._listed[folder] = time.monotonic(), files, folders
        return files, folders

    def _known_members(self, folder: RemotePlace) -> tuple[Sequence[str], Sequence[str]] | None:
        with self._lock:
            since, files, folders = self._listed.get(folder, (-_LISTED, [], []))
        return (files, folders) if time.monotonic() - since < _LISTED else None

    def forget_lists(self) -> None:
        """Clear the cache of folders' members, after something was written."""
        with self._lock:
            self._listed.clear()


class _Stream(io.RawIOBase):
    """A file as a stream; consecutive reads fetch blocks of increasing size."""

    def __init__(self, backend: Backend, file: RemotePlace, state: FileState) -> None:
        super().__init__()
        self._backend, self._file, self._state = backend, file, state
        self._at = 0
        self._start, self._block = 0, memoryview(b"")
        self._length = _FIRST_BLOCK

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position without fetching data."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._state.size}[whence]
        if origin + offset < 0:
            raise ValueError("a position before the beginning")
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as the file has data."""
        wanted = memoryview(buffer).cast("B")
        done = 0
        while done < len(wanted) and self._at < self._state.size:
            inside = self._at - self._start
            if not 0 <= inside < len(self._block):
                self._next(len(wanted) - done)
                inside = 0
            count = min(len(wanted) - done, len(self._block) - inside)
            wanted[done : done + count] = self._block[inside : inside + count]
            done, self._at = done + count, self._at + count
        return done

    def _next(self, wanted: int) -> None:
        """Fetch the block at the position."""
        follows = self._at == self._start + len(self._block)
        self._length = min(2 * self._length, RANGE) if follows and self._at else _FIRST_BLOCK
        length = max(self._length, min(wanted, RANGE))
        stop = min(self._at + length, self._state.size)
        found = self._backend.fetch(self._file, self._state, self._at, stop)
        self._start, self._block = self._at, memoryview(found).cast("B")


def changed(file: RemotePlace) -> StarmergeError:
    """Return the error for a file that has changed since it was opened."""
    return StarmergeError(
        f"{file} was replaced while it was read, so what was made of it is neither the old nor the "
        "new. Begin again when nothing writes there."
    )
