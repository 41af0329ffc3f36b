"""The hidden folders and files of outputs: their names, their locks, and leftovers of killed runs.

An output is written next to its final place, as ``.NAME.partial-SUFFIX``; a folder that it replaces
is renamed to ``.NAME.replaced-SUFFIX``. If a process is killed, its hidden files remain as
*leftovers*. A running process holds a lock on its hidden folder or file, which the system releases
when the process ends.
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
    """A hidden folder or file next to an output, of a killed or running process."""

    path: Path
    role: Literal["partial", "replaced"]
    """"partial" for a new output, "replaced" for the old output that it replaces."""

    def is_in_work(self) -> bool:
        """Whether the process that writes it still runs.

        Only processes of this machine are detected, not those of other machines that share the
        folder over the network.
        """
        try:
            held = lock(self.path)
        except OSError:  # it was deleted, or belongs to another user
            return False
        if held is not None:
            os.close(held)
        return held is None

    def is_only_copy(self) -> bool:
        """Whether it is a replaced output whose place is empty."""
        if self.role == "partial":
            return False
        folder = self.path.parent
        stem = self.path.name.rpartition(".replaced-")[0]
        return not any(f".{_stem(member)}" == stem for member in folder.iterdir())

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return sum(state.st_blocks * 512 for state in self._states())

    @property
    def written(self) -> float:
        """Time of the last write, in seconds since the epoch."""
        return max((state.st_mtime for state in self._states()), default=0.0)

    def _states(self) -> Iterator[os.stat_result]:
        members = self.path.rglob("*") if self.path.is_dir() else ()
        for member in (self.path, *members):
            with contextlib.suppress(FileNotFoundError):  # it is being created or deleted
                yield member.lstat()

    def delete(self) -> None:
        """Delete it.

        Raises:
            UsageError: The process that writes it still runs.
            StarmergeError: The system refuses to delete it.
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
"""Most additional bytes of a hidden name compared to the output's name."""


def hidden_prefix(path: Path, role: Literal["partial", "replaced"]) -> str:
    """Return the prefix of the hidden names of an output."""
    return f".{_stem(path)}.{role}-"


def _stem(path: Path) -> str:
    """Return an output's name for hidden names, shortened by a hash if these would be too long."""
    room = longest_name(path) - _DECORATION
    stem = path.name
    if len(os.fsencode(stem)) <= room:
        return stem
    digest = hashlib.blake2b(os.fsencode(stem), digest_size=4).hexdigest()
    while len(os.fsencode(stem)) > room - len(digest) - 1:
        stem = stem[:-1]
    return f"{stem}~{digest}"


def longest_name(path: Path) -> int:
    """Return the largest length of a file's name at ``path``, in bytes."""
    return os.pathconf(nearest_parent(path), "PC_NAME_MAX")


def lock(path: Path) -> int | None:
    """Lock a folder or a file; return the descriptor of the lock, None if another process has it.

    On file systems without locks nothing is locked.

    Raises:
        OSError: It cannot be opened, or has been deleted.
    """
    # NFS requires a descriptor that is open for writing to lock a file.
    mode = os.O_RDONLY if path.is_dir() else os.O_RDWR
    descriptor = os.open(path, mode | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # the file system has no locks
            pass
        path.stat()  # raises if the process that had the lock before has deleted it
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def nearest_parent(path: Path) -> Path:
    """Return the nearest existing parent of a path, which should be a folder."""
    return next(parent for parent in path.absolute().parents if os.path.lexists(parent))
