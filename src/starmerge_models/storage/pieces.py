"""Outputs in object stores that several machines write: pieces, which are assembled at the end.

Object stores cannot write into the middle of an object. So each machine sends its parts of a file
as separate objects, *pieces*, below ``.NAME.partial-SUFFIX`` next to the output. When all pieces
exist, a machine reads those of a file in order and sends them as one object. The data does not pass
through the machine that runs the merge, except for files that it reads itself.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock, get_ident

from obstore.exceptions import BaseError

from starmerge_models.errors import PiecesLostError, UsageError
from starmerge_models.storage.local_folder import LocalFolder
from starmerge_models.storage.parts import Parts, goes_in_parts, part_length
from starmerge_models.storage.places import RemotePlace
from starmerge_models.storage.regular import named
from starmerge_models.storage.requests import ObjectBackend, in_words
from starmerge_models.storage.scratch import Scratch
from starmerge_models.storage.storage import MARK, ShortFileError

PIECE = 16 * 2**20
"""Most bytes of a piece."""

_AT_ONCE = 4
"""Concurrent requests of a machine for the pieces of one tensor or file."""

_NAME = re.compile(r"(?P<file>.+)/(?P<start>\d{15})\+(?P<length>\d+)of(?P<size>\d+)")

_SUFFIX = re.compile(r"\w+", re.ASCII)

_BACKEND = ObjectBackend()


def pieces_of(output: RemotePlace, suffix: str) -> RemotePlace:
    """Return the place of an output's pieces.

    Args:
        output: The output.
        suffix: The run's suffix; see
            :func:`~starmerge_models.storage.publishing.output_folder`.
    """
    return output.with_name(f".{output.name}.partial-{suffix}")


def suffix_of(pieces: RemotePlace) -> str:
    """Return the suffix of the run from the place of its pieces."""
    return pieces.name.rpartition(".partial-")[2]


@dataclass(frozen=True, order=True)
class _Piece:
    """A range of a file's bytes, stored in an object or a part of one."""

    start: int
    """Offset in the file."""
    length: int
    place: RemotePlace
    skipped: int = 0
    """Bytes at the beginning of the object that another piece contains too."""


@dataclass(frozen=True)
class PiecesOfFile:
    """The pieces of a file in a store.

    Args:
        name: The file, relative to the output.
        size: Size of the file in bytes.
        pieces: The pieces, sorted; overlapping pieces have the same bytes.
    """

    name: str
    size: int
    pieces: tuple[_Piece, ...]

    @property
    def memory(self) -> int:
        """Memory of :meth:`send` in bytes."""
        part = part_length(self.size) if goes_in_parts(self.size) else self.size
        return min(self.size, 2 * _AT_ONCE * PIECE) + 2 * _AT_ONCE * part

    def check(self) -> None:
        """Check that the pieces cover the whole file.

        Raises:
            PiecesLostError: Some bytes are missing.
        """
        whole = self._segments()
        if sum(piece.length for piece in whole) != self.size:
            raise PiecesLostError(
                f"The store lacks pieces of {self.name}, which this merge had sent: they were "
                "deleted meanwhile. Begin again with --fresh."
            )

    def contents(self) -> Iterator[memoryview]:
        """Yield the bytes of the file in order, and prefetch the next ones."""
        self.check()
        waiting = deque[Future[memoryview]]()
        with ThreadPoolExecutor(_AT_ONCE, "pieces") as pool:
            try:
                for piece in self._segments():
                    waiting.append(pool.submit(_fetch, piece))
                    if len(waiting) > _AT_ONCE:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def read(self, offset: int, length: int) -> memoryview:
        """Return some bytes of the file.

        Raises:
            ShortFileError: The store lacks some of them.
        """
        content, count = memoryview(bytearray(length)), 0
        for piece in self._segments():
            start = max(offset, piece.start)
            stop = min(offset + length, piece.start + piece.length)
            if start < stop:
                skipped = piece.skipped + start - piece.start
                part = replace(piece, start=start, length=stop - start, skipped=skipped)
                content[start - offset : stop - offset] = _fetch(part)
                count += part.length
        if count != length:
            raise ShortFileError(f"the store lacks pieces of {self.name}")
        return content

    def send(self, target: RemotePlace) -> None:
        """Assemble the file to one object, which appears when it is complete.

        Args:
            target: The object.

        Raises:
            PiecesLostError: A piece is missing.
            StarmergeError: The store fails.
        """
        if not goes_in_parts(self.size):
            _BACKEND.put(target, b"".join(self.contents()))
            return
        store = _BACKEND.store(target)
        try:
            with Parts(store, target.path, self.size, at_once=_AT_ONCE) as parts:
                for content in self.contents():
                    parts.write(content)
                parts.complete()
        except (BaseError, OSError, ValueError) as error:
            raise in_words(target, error) from None

    def _segments(self) -> list[_Piece]:
        """Return the range to read of each piece, without overlaps."""
        found, end = list[_Piece](), 0
        for piece in self.pieces:
            known = max(0, end - piece.start)
            if known < piece.length:
                found.append(
                    replace(
                        piece,
                        start=piece.start + known,
                        length=piece.length - known,
                        skipped=known,
                    )
                )
                end = piece.start + piece.length
        return found


def files_in(pieces: RemotePlace, name: str = "") -> dict[str, PiecesOfFile]:
    """Return the files of which a store has pieces, by name.

    Args:
        pieces: The place of an output's pieces.
        name: A file or a folder of the output, to list only its files.
    """
    found: dict[tuple[str, int], list[_Piece]] = {}
    begin = f"{name}/" if name else ""
    for key in _BACKEND.tree(pieces / name):
        known = _NAME.fullmatch(begin + key)
        if known is not None:
            own = found.setdefault((known["file"], int(known["size"])), [])
            own.append(_Piece(int(known["start"]), int(known["length"]), pieces / known[0]))
    return {
        file: PiecesOfFile(file, size, tuple(sorted(own))) for (file, size), own in found.items()
    }


def _fetch(piece: _Piece) -> memoryview:
    begin = piece.skipped
    return memoryview(_BACKEND.fetch(piece.place, None, begin, begin + piece.length)).cast("B")


@dataclass(frozen=True)
class PiecesLeft:
    """Pieces of an output whose run was killed, or still goes on; see :class:`PartialOutput`.

    Args:
        path: The place of the pieces.
        is_held: Whether a process of this machine writes the output.
    """

    path: RemotePlace
    is_held: bool

    def is_in_work(self) -> bool:
        """Whether the run still goes on; only processes of this machine are detected."""
        return self.is_held

    def is_only_copy(self) -> bool:
        """Return False: pieces replace nothing."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(_BACKEND.tree(self.path).values())

    @property
    def written(self) -> float:
        """Time of the last piece, in seconds since the epoch."""
        return _BACKEND.written(self.path)

    def delete(self) -> None:
        """Delete them.

        Raises:
            UsageError: The run still goes on.
        """
        if self.is_held:
            raise UsageError(f"{self.path} belongs to a process that still runs.")
        delete_pieces(self.path)


def pieces_left(output: RemotePlace) -> list[PiecesLeft]:
    """List the pieces of all runs of an output."""
    own = [left for left in Scratch(output).leftovers() if left.is_in_work()]
    _, folders = _BACKEND.members(output.parent)
    begin = pieces_of(output, "").name
    return [
        PiecesLeft(
            output.with_name(name),
            any(left.path.name.endswith(name.removeprefix(begin)) for left in own),
        )
        for name in sorted(folders)
        # The pieces of an output called NAME.partial-2 have the same prefix.
        if name.startswith(begin) and _SUFFIX.fullmatch(name, len(begin))
    ]


def delete_pieces(pieces: RemotePlace) -> None:
    """Delete all pieces of an output."""
    _BACKEND.delete(pieces, _BACKEND.tree(pieces))


@dataclass(frozen=True)
class PieceFolder:
    """An output before publication, for all machines that write it.

    Args:
        pieces: The place of the pieces.
        home: On the machine that runs the merge, its local folder for small files, the journal, and
            downloaded files. None on other machines, because pickling leaves it out.
    """

    pieces: RemotePlace
    home: LocalFolder | None = None

    is_complete = False

    def __reduce__(self) -> tuple[type[PieceFolder], tuple[RemotePlace]]:
        return PieceFolder, (self.pieces,)

    def shared(self) -> PieceFolder:
        """Return the folder itself."""
        return self

    def mark(self, text: str) -> RemotePlace:
        """Write a text to the mark file in the store; return its place."""
        file = self.pieces / MARK
        _BACKEND.put(file, text.encode())
        return file

    def open(self, name: str, size: int) -> PieceFile:
        """Open a file for writing; pieces of an earlier run are kept."""
        if self.home is not None:
            self.home.delete(name)  # delete a copy that an earlier run has downloaded
        return PieceFile(self.pieces, name, size)

    def put(self, name: str, content: bytes) -> None:
        """Write a small file at once."""
        self._home.put(name, content)

    def append(self, name: str, content: bytes) -> None:
        """Append bytes to a local file, and sync them to the disk."""
        self._home.append(name, content)

    def delete(self, name: str) -> None:
        """Delete a file or a folder with its content, if it exists."""
        self._home.delete(name)
        _BACKEND.delete(self.pieces / name, _BACKEND.tree(self.pieces / name))

    def names(self) -> list[str]:
        """List the files, sorted."""
        return sorted({*self._home.names(), *files_in(self.pieces)})

    def place(self, name: str) -> Path:
        """Download a file, or the files of a folder; return the local path."""
        if self._home.place(name).is_file():
            return self._home.place(name)
        for file in files_in(self.pieces, name).values():
            target, offset = self._home.open(file.name, file.size), 0
            try:
                for content in file.contents():
                    target.write(content, offset)
                    offset += len(content)
            finally:
                target.close()
        return self._home.place(name)

    @property
    def _home(self) -> LocalFolder:
        assert self.home is not None, "only the machine that runs the merge has a local folder"
        return self.home


@dataclass(frozen=True)
class StagedFolder(LocalFolder):
    """A local folder that is uploaded when it is complete.

    Args:
        pieces: The place of its files' pieces, if several machines write them.
    """

    pieces: RemotePlace = field(kw_only=True)

    def shared(self) -> PieceFolder:
        """Return the folder for machines that fill its files together."""
        return PieceFolder(self.pieces, self)


@dataclass
class _Run:
    """Data that a thread has written and that is not sent yet."""

    start: int
    content: bytearray = field(default_factory=bytearray)

    @property
    def stop(self) -> int:
        return self.start + len(self.content)


class PieceFile:
    """A file that several machines write in any order, each by sending pieces of it.

    Args:
        pieces: The place of the output's pieces.
        name: The file, relative to the output.
        size: Size of the file in bytes.
    """

    def __init__(self, pieces: RemotePlace, name: str, size: int) -> None:
        self._pieces, self._name, self._size = pieces, name, size
        self._lock = Lock()
        self._runs: dict[int, _Run] = {}
        """Unsent data by thread."""
        self._known: PiecesOfFile | None = None

    def write(self, content: memoryview, offset: int, *, more: bool = False) -> None:
        """Write bytes at ``offset``.

        They are in the store when this method returns, unless ``more`` is set.
        """
        with self._lock:
            run = self._runs.pop(get_ident(), _Run(offset))
        if run.stop != offset:
            self._send(memoryview(run.content), run.start)
            run = _Run(offset)
        if not more and not run.content:  # send the content without copying it
            self._send(content, offset)
            return
        run.content += content
        if more and len(run.content) < PIECE:
            with self._lock:
                self._runs[get_ident()] = run
        else:
            self._send(memoryview(run.content), run.start)

    def copy(self, source: Path, start: int, length: int, offset: int) -> None:
        """Send bytes of a local file."""

        def send(begin: int) -> None:
            count = min(PIECE, length - begin)
            with named(source), source.open("rb") as stream:  # buffered: no short reads
                stream.seek(start + begin)
                content = stream.read(count)
            if len(content) != count:
                raise ShortFileError(f"{source} ends early")
            self._put(content, offset + begin)

        _side_by_side(send, range(0, length, PIECE))

    def read(self, offset: int, length: int) -> memoryview:
        """Return bytes of the file.

        Raises:
            ShortFileError: Some of the bytes were not written.
        """
        known = self._known  # another thread resets it when it writes
        if known is None:
            found = files_in(self._pieces, self._name)
            known = found.get(self._name, PiecesOfFile(self._name, self._size, ()))
            self._known = known
        return known.read(offset, length)

    def sync(self) -> None:
        """Do nothing: written data is in the store already."""

    def close(self) -> None:
        """Discard unsent data of unfinished tensors."""
        with self._lock:
            self._runs.clear()

    def _send(self, content: memoryview, offset: int) -> None:
        def send(start: int) -> None:
            self._put(content[start : start + PIECE], offset + start)

        _side_by_side(send, range(0, len(content), PIECE))

    def _put(self, content: memoryview | bytes, offset: int) -> None:
        name = f"{offset:015d}+{len(content)}of{self._size}"
        _BACKEND.put(self._pieces / self._name / name, content)
        self._known = None


def _side_by_side(work: Callable[[int], None], starts: Sequence[int]) -> None:
    """Call a function for all numbers, with several calls at the same time."""
    if len(starts) == 1:
        work(starts[0])
        return
    with ThreadPoolExecutor(_AT_ONCE, "pieces") as pool:
        for _ in pool.map(work, starts):
            pass
