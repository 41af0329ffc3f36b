"""The hidden folders and files that outputs are made in: their names, locks, and what stays behind.

An output is made beside its place, as ``.NAME.partial-SUFFIX``; a folder that it replaces becomes
``.NAME.replaced-SUFFIX``. A process that is killed leaves them behind: its *leftovers*. One that
still runs holds a lock on its own, which the system takes back when the process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from starmerge_models.errors import StarmergeError, UsageError


@dataclass(frozen=True)
class Leftover:
    """A hidden folder or file beside an output, of a process that was killed, or still runs."""

    path: Path
    role: Literal["partial", "replaced"]
    """Whether it was to become the output, or changed places with it (or was about to)."""

    def is_in_work(self) -> bool:
        """Whether the process that makes it still runs.

        Seen within one machine: not on another that shares the folder over the network.
        """
        try:
            held = lock(self.path)
        except OSError:  # nothing to open any more, or of another user
            return False
        if held is not None:
            os.close(held)
        return held is None

    def is_only_copy(self) -> bool:
        """Whether it was replaced, and nothing stands in its place."""
        if self.role == "partial":
            return False
        folder = self.path.parent
        stem = self.path.name.rpartition(".replaced-")[0]
        return not any(f".{_stem(member)}" == stem for member in folder.iterdir())

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on the disk."""
        return sum(state.st_blocks * 512 for state in self._states())

    @property
    def written(self) -> float:
        """When something in it was last written, seconds since the epoch."""
        return max((state.st_mtime for state in self._states()), default=0.0)

    def _states(self) -> Iterator[os.stat_result]:
        members = self.path.rglob("*") if self.path.is_dir() else ()
        for member in (self.path, *members):
            with contextlib.suppress(FileNotFoundError):  # while it is being made or deleted
                yield member.lstat()

    def delete(self) -> None:
        """Delete it.

        Raises:
            UsageError: The process that makes it still runs.
            StarmergeError: The system refuses.
        """
        try:
            held = lock(self.path)
            if held is None:
                raise UsageError(f"{self.path} belongs to a process that still runs.")
            try:
                if self.path.is_dir():
                    shutil.rmtree(self.path)
                else:
                    self.path.unlink()
            finally:
                os.close(held)
        except OSError as error:
            raise StarmergeError(f"{self.path} cannot be deleted: {error}.") from error


def leftovers(path: Path) -> list[Leftover]:
    """List the hidden folders and files of an output: those of killed and of running processes."""
    path = path.resolve()
    prefixes = (hidden_prefix(path, "partial"), hidden_prefix(path, "replaced"))
    return [found for found in leftovers_in(path.parent) if found.path.name.startswith(prefixes)]


def leftovers_in(folder: Path) -> list[Leftover]:
    """List the hidden folders and files of all outputs in a folder, sorted by name."""
    found = []
    for member in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _HIDDEN.fullmatch(member.name)
        if match is not None and not member.is_symlink():
            found.append(Leftover(member, "partial" if match[1] == "partial" else "replaced"))
    return found


_HIDDEN = re.compile(r"\..+\.(partial|replaced)-\w+", re.ASCII | re.DOTALL)
_DECORATION = len("..replaced-") + 32
"""Most bytes that a hidden name has more than the name."""


def hidden_prefix(path: Path, role: Literal["partial", "replaced"]) -> str:
    """Return how hidden names of an output begin."""
    return f".{_stem(path)}.{role}-"


def _stem(path: Path) -> str:
    """Return the name of an output; if hidden names would be too long: its beginning and a hash."""
    room = longest_name(path) - _DECORATION
    stem = path.name
    if len(os.fsencode(stem)) <= room:
        return stem
    digest = hashlib.blake2b(os.fsencode(stem), digest_size=4).hexdigest()
    while len(os.fsencode(stem)) > room - len(digest) - 1:
        stem = stem[:-1]
    return f"{stem}~{digest}"


def longest_name(path: Path) -> int:
    """Return how many bytes the name of a file may have at ``path``."""
    return os.pathconf(nearest_parent(path), "PC_NAME_MAX")


def lock(path: Path) -> int | None:
    """Lock a folder or a file; return the descriptor that holds the lock, None if another has it.

    Where the file system knows no locks, nothing is locked.

    Raises:
        OSError: It cannot be opened, or has been deleted.
    """
    # NFS locks files only for processes that may write to them.
    mode = os.O_RDONLY if path.is_dir() else os.O_RDWR
    descriptor = os.open(path, mode | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # the file system knows no locks
            pass
        path.stat()  # the process that had the lock before may have deleted it
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def nearest_parent(path: Path) -> Path:
    """Return the last part of a path above its end that exists: a folder if all is well."""
    return next(parent for parent in path.absolute().parents if os.path.lexists(parent))
