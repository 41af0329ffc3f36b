"""Atomic publication of outputs: an output appears complete or not at all.

A folder or a file is written next to its place, as ``.NAME.partial-SUFFIX``, synced to the disk,
and renamed at the end. If it replaces a folder, the two names are exchanged atomically, and the old
folder is then deleted, as ``.NAME.replaced-SUFFIX``; see
:mod:`starmerge_models.storage.leftovers`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from starmerge_models.errors import Interrupted, StarmergeError, UsageError, WorkersLostError
from starmerge_models.events import Published, emit
from starmerge_models.parsing import MOST_JSON_BYTES, parse_json
from starmerge_models.storage.exchange import exchange
from starmerge_models.storage.leftovers import (
    hidden_prefix,
    leftovers,
    lock,
    longest_name,
    nearest_parent,
)
from starmerge_models.storage.local_folder import LocalFolder
from starmerge_models.storage.places import WRITTEN, is_url, without_secrets
from starmerge_models.storage.regular import open_regular
from starmerge_models.storage.storage import ShortFileError

REPORT = "merge_report.json"
"""Name of the report in a merged model's folder, by which a merge's output is recognised."""


@dataclass(frozen=True)
class Replaceable:
    """A kind of output folder that a later output may replace."""

    name: str
    marker: str
    """JSON file by which the folder is recognised. The files that it lists under ``files``,
    relative to the folder, belong to the folder."""
    members: tuple[str, ...] = ()
    """Patterns of other names that the folder may contain."""


MERGED_MODEL = Replaceable("merged model", REPORT)

_LITTER = (".DS_Store", "._*", "Thumbs.db", "desktop.ini", "__pycache__")
"""Files that file managers and Python create in any folder; they are deleted with the folder."""


def check_output(path: Path, *, overwrite: bool, kind: Replaceable = MERGED_MODEL) -> None:
    """Check that a folder may be published under ``path``.

    Only a folder of the same kind is replaced: it must contain the marker, and no files other than
    those that starmerge wrote.

    Raises:
        UsageError: The place is taken by something that may not be replaced, another process is
            writing this output, or a folder of that name cannot be created.
    """
    with _as_usage_error(path):
        _check_place(path)
        _check_replaceable(path, overwrite=overwrite, kind=kind)
        _check_not_in_work(path)


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Check that a file may be published under ``path``.

    Raises:
        UsageError: The place is taken by something that may not be replaced, another process is
            writing this output, or a file of that name cannot be created.
    """
    with _as_usage_error(path):
        _check_place(path)
        _check_replaceable_file(path, overwrite=overwrite)
        _check_not_in_work(path)


def check_space(path: Path, wanted: int, *, advice: str = "a smaller --dtype") -> None:
    """Check that the disk of ``path`` has ``wanted`` bytes free.

    Args:
        path: The output.
        wanted: Size of the output in bytes.
        advice: Advice for the error message.

    Raises:
        StarmergeError: The disk has less free space.
    """
    free = shutil.disk_usage(nearest_parent(path)).free
    if free < wanted:
        raise StarmergeError(
            f"{path} needs {wanted / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free. "
            f"Choose another disk, or {advice}."
        )


@contextmanager
def output_folder(
    path: Path,
    *,
    overwrite: bool = False,
    kind: Replaceable = MERGED_MODEL,
    suffix: str | None = None,
    member: str | None = None,
    is_final: bool = True,
) -> Iterator[LocalFolder]:
    """Yield a hidden folder next to ``path`` that is renamed to ``path`` after the block.

    If the block raises an error, the folder is deleted; if the process is killed, it remains under
    its hidden name, ``.NAME.partial-…``. An existing folder under ``path`` is replaced at the end,
    atomically: the two names are exchanged, then the old folder is deleted. If the system or the
    file system cannot exchange names (NFS), two renames are used, and a process that is killed
    between them leaves both folders under hidden names.

    Args:
        path: The folder to create.
        overwrite: Replace an existing folder of the same kind.
        kind: The kind of folder.
        suffix: The end of the hidden name instead of a random one: up to 32 letters and digits,
            such as a hash of everything that determines the content. It makes the folder resumable:
            a folder of that name from an interrupted run is yielded with its content. The folder is
            kept after SIGTERM (:class:`Interrupted`), after a failure of the system, such as a full
            disk or a revoked permission, and after :class:`WorkersLostError`; Ctrl-C and all other
            errors delete it.
        member: The only file of the folder to publish, as a file under ``path``; the rest of the
            folder is deleted.
        is_final: Whether this is the final place of the output; False if it is uploaded from there.

    Raises:
        UsageError: Something that may not be replaced has appeared under ``path`` meanwhile, or
            another process is writing this output. Of two processes that start at the same moment,
            at least one is refused.
        StarmergeError: The disk is full, or fails otherwise.
    """
    if member is None:
        check_output(path, overwrite=overwrite, kind=kind)
    else:
        check_output_file(path, overwrite=overwrite)
    path = path.resolve()
    with _failures_named(path):
        new_parents = _make_parent(path)
        partial = _make_folder(path, suffix)
        held = _lock_own(partial, path)
    try:
        with _failures_named(path, None if suffix is None else partial):
            yield LocalFolder(partial)
            _sync_tree(partial)
            if member is None:
                _check_replaceable(path, overwrite=overwrite, kind=kind)
                replaced = _put(partial, path, replace=overwrite)
            else:
                _check_replaceable_file(path, overwrite=overwrite)
                (partial / member).replace(path)
                replaced = partial
            with contextlib.suppress(OSError):  # the output is published already
                _sync(*new_parents, path.parent)
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)
        if is_final:
            emit(Published(str(path)))
    except (KeyboardInterrupt, Interrupted) as interruption:
        is_kept = suffix is not None and getattr(interruption, "signal", None) == signal.SIGTERM
        if not is_kept:
            shutil.rmtree(partial, ignore_errors=True)
        elif isinstance(interruption, Interrupted) and partial.exists():
            interruption.kept.append(partial)
        raise
    except BaseException as error:
        if suffix is None or not _may_be_mended(error):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(held)


@contextmanager
def output_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden file next to ``path`` that is renamed to ``path`` after the block.

    If the block raises an error, the file is deleted; if the process is killed, it remains under
    its hidden name, ``.NAME.partial-…``. An existing file is replaced only at the end.

    Raises:
        UsageError: Something that may not be replaced has appeared under ``path`` meanwhile, or
            another process is writing this output.
        StarmergeError: The disk is full, or fails otherwise.
    """
    check_output_file(path, overwrite=overwrite)
    path = path.absolute()
    with _failures_named(path):
        new_parents = _make_parent(path)
        descriptor, name = tempfile.mkstemp(prefix=hidden_prefix(path, "partial"), dir=path.parent)
        os.close(descriptor)
        partial = Path(name)
        held = _lock_own(partial, path)
    try:
        with _failures_named(path):
            partial.chmod(0o666 & ~_UMASK)
            yield partial
            _sync(partial)
            _check_replaceable_file(path, overwrite=overwrite)
            partial.replace(path)
            with contextlib.suppress(OSError):
                _sync(*new_parents, path.parent)
        emit(Published(str(path)))
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(held)


def printable(name: str) -> str:
    """Return the name of a file as text: bytes that are not UTF-8 become replacement characters."""
    return os.fsencode(name).decode(errors="replace")


class _NotMadeError(StarmergeError):
    """The system refused an operation on an output; the cause is the system's error."""


@contextmanager
def _as_usage_error(path: Path) -> Iterator[None]:
    """Convert the system's errors about a path to a UsageError."""
    try:
        yield
    # pathlib raises RuntimeError for circular links, ValueError for a NUL in the name.
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} cannot be an output: {error}. Choose another.") from error


@contextmanager
def _failures_named(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Convert the system's errors to errors that name the output.

    Args:
        path: The output.
        partial: Its hidden folder, if a later run can resume it.
    """
    try:
        yield
    except WorkersLostError as loss:
        if partial is None:
            raise
        raise WorkersLostError(
            f"{loss} What was written is kept in {partial}: run the same again to go on with it."
        ) from loss
    # The error of a file inside an output folder, such as a figure, names the folder.
    except (OSError, _NotMadeError) as failure:
        error = failure if isinstance(failure, OSError) else failure.__cause__
        kept = "Nothing was left there"
        if partial is not None and partial.is_dir():
            kept = (
                f"What was made of it is kept in {partial}: run the same command again to go on "
                "with it, if no input changes until then, or delete it (starmerge clean)"
            )
        raise _NotMadeError(
            f"{path} was not made: {error}. {kept}; what stood there is kept."
        ) from error


def _may_be_mended(error: BaseException) -> bool:
    """Return whether an error is one of the system or a cluster, not of an input.

    A file that has become shorter is a changed input, so no later run can resume.
    """
    if isinstance(error, WorkersLostError):
        return True
    return isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, ShortFileError)


def _check_place(path: Path) -> None:
    """Check that the name can be created, including missing parent folders."""
    if is_url(path):
        raise UsageError(
            f"{without_secrets(str(path))} is a URL, and this output is written to a folder of "
            "this machine. Give a folder, and copy it there when it is complete. (Merges are "
            f"written to {', '.join(f'{own}://' for own in WRITTEN)} too.)"
        )
    if not path.resolve().name:
        raise UsageError(f"{path} is the root of the file system. Choose another output.")
    parent = nearest_parent(path)
    if not parent.is_dir():
        kind = "a link that leads nowhere" if parent.is_symlink() else "a file"
        raise UsageError(f"{path} cannot be created: {parent} is {kind}.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be created: {parent} is not writable.")
    longest = longest_name(path)
    for name in path.absolute().relative_to(parent).parts:
        count = len(os.fsencode(name))
        if count > longest:
            raise UsageError(
                f"{path} cannot be created: {name} has {count} bytes, and names here "
                f"have {longest} at most. Choose a shorter one."
            )


def _check_not_in_work(path: Path) -> None:
    for leftover in leftovers(path):
        if leftover.is_in_work():
            raise _in_work(path, leftover.path)


def _in_work(path: Path, partial: Path) -> UsageError:
    return UsageError(
        f"{path} is being made by another process, in {partial}. Wait until it is done, or choose "
        "another output."
    )


def _check_replaceable(path: Path, *, overwrite: bool, kind: Replaceable) -> None:
    if path.is_symlink():
        raise UsageError(f"{path} is a symbolic link. Give the folder itself.")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file. Choose another output folder.")
    if path.is_mount():
        raise UsageError(
            f"{path} is a disk of its own, which cannot be replaced. Choose a folder in it."
        )
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"{path} exists and is not empty. Choose another folder, or replace it with "
            "--overwrite."
        )
    if not (path / kind.marker).is_file():
        raise UsageError(
            f"{path} holds no {kind.marker}, so it is no {kind.name} and is not overwritten. "
            "Choose another folder, or delete it yourself."
        )
    listed = {kind.marker, *_listed(path / kind.marker)}
    foreign = _foreign(path, "", listed, kind.members)
    if foreign is not None:
        raise UsageError(
            f"{path} holds {foreign}, which is no part of the {kind.name} that was written there, "
            "and is not overwritten. Take it away, or choose another folder."
        )


def _listed(marker: Path) -> Collection[str]:
    """Return the files that a marker lists; empty if the marker cannot be read."""
    try:
        with open_regular(marker) as stream:
            files = parse_json(stream.read(MOST_JSON_BYTES)).get("files")
    except (StarmergeError, OSError, ValueError, AttributeError):
        return ()
    return [file for file in files if isinstance(file, str)] if isinstance(files, list) else ()


def _foreign(
    folder: Path, place: str, listed: Collection[str], patterns: Collection[str]
) -> str | None:
    """Return the first file or folder that is not listed and matches no pattern; None if none.

    Args:
        folder: The folder to search.
        place: The folder's path relative to the output, with a slash; empty for the output itself.
        listed: Files that belong to the output, relative to it.
        patterns: Patterns of names that belong to this folder.
    """
    for member in sorted(folder.iterdir()):
        name = f"{place}{member.name}"
        if name in listed or any(
            fnmatchcase(member.name, known) for known in (*_LITTER, *patterns)
        ):
            continue
        is_ours = any(file.startswith(f"{name}/") for file in listed)
        if not is_ours or not member.is_dir() or member.is_symlink():
            return name
        found = _foreign(member, f"{name}/", listed, ())
        if found is not None:
            return found
    return None


def _check_replaceable_file(path: Path, *, overwrite: bool) -> None:
    if path.is_symlink() or path.is_dir():
        raise UsageError(f"{path} is a folder or a link. Give the file to write.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists. Choose another file, or replace it with --overwrite.")


def _make_parent(path: Path) -> list[Path]:
    """Create the parent folders of an output; return those with new entries, except the last."""
    nearest = nearest_parent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return [parent for parent in path.parents[1:] if parent.is_relative_to(nearest)]


_SUFFIX = re.compile(r"\w{1,32}", re.ASCII)


def _make_folder(path: Path, suffix: str | None) -> Path:
    """Create the hidden folder of an output, unless it exists."""
    prefix = hidden_prefix(path, "partial")
    if suffix is None:
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    elif _SUFFIX.fullmatch(suffix):
        partial = path.parent / f"{prefix}{suffix}"
        partial.mkdir(exist_ok=True)
    else:
        raise ValueError(f"{suffix!r} is no suffix: up to 32 of the letters A-Z, a-z, 0-9 and _.")
    partial.chmod(0o777 & ~_UMASK)
    return partial


def _lock_own(partial: Path, path: Path) -> int:
    """Lock the hidden folder or file of this process; return the descriptor of the lock.

    Raises:
        UsageError: Another process is writing the same output.
    """
    held = lock(partial)
    if held is None:
        raise _in_work(path, partial)
    others = [found for found in leftovers(path) if found.path.name != partial.name]
    for other in others:
        if other.is_in_work():
            os.close(held)
            with contextlib.suppress(OSError):  # not empty: keep the files of an earlier run
                partial.rmdir() if partial.is_dir() else partial.unlink()
            raise _in_work(path, other.path)
    return held


def _put(partial: Path, path: Path, *, replace: bool) -> Path | None:
    """Rename a complete folder to its final name; return the path of the folder it replaced.

    Raises:
        OSError: The place is taken, or the system refuses. Nothing is changed then.
    """
    if not replace or not path.is_dir() or not any(path.iterdir()):
        partial.rename(path)  # replaces an empty folder atomically, and no other
        return None
    aside = Path(tempfile.mkdtemp(prefix=hidden_prefix(path, "replaced"), dir=path.parent))
    new = partial.stat()
    try:
        # Rename the old folder too, so that it is not mistaken for a partial output.
        partial.rename(aside)
        if not exchange(aside, path):
            aside.rename(partial)
            path.rename(aside)
            partial.rename(path)
    except BaseException:
        if not path.exists():
            aside.rename(path)
        elif aside.exists() and os.path.samestat(aside.stat(), new):
            aside.rename(partial)
        else:  # still empty, or the old folder after the exchange
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return aside


def _sync_tree(folder: Path) -> None:
    """Give a folder's content the permissions of new files, and sync it to the disk."""
    for member in [*folder.rglob("*"), folder]:
        if not member.is_dir():
            member.chmod(0o666 & ~_UMASK)  # some libraries create files readable by the owner only
        _sync(member)


def _sync(*paths: Path) -> None:
    """Sync files, or the entries of folders, to the disk, if the system supports it.

    Raises:
        OSError: The disk failed, or is full.
    """
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                if hasattr(fcntl, "F_FULLFSYNC"):  # on macOS fsync does not flush the disk's cache
                    fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()
"""Read once at import, because reading the umask sets it for all threads."""
