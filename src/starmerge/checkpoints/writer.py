"""Writing a model: a folder that appears whole or not at all, shards written tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from starmerge.checkpoints.tensors import DTYPE_CODES, Checkpoint, raw_bytes, write_at
from starmerge.checkpoints.write_behind import WriteBehind
from starmerge.errors import StarmergeError, UsageError

REPORT = "merge_report.json"
"""The report in a merged model's folder; a folder that has it was written by a merge."""

SHARD_BYTES = 5 * 10**9
"""Largest shard, as transformers writes them; a larger tensor gets a shard of its own."""


_PIECE = 2**20
"""Bytes that are read back at once."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor as it will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Replaceable:
    """A kind of folder that a later one may replace."""

    name: str
    marker: str
    """File by which it is known."""


MERGED_MODEL = Replaceable("merged model", REPORT)


def check_output(path: Path, *, overwrite: bool, kind: Replaceable = MERGED_MODEL) -> None:
    """Make sure that a folder may appear under ``path``.

    Raises:
        UsageError: Something stands there already that may not be replaced, or the parent cannot
            be written to. Only a folder of the same kind, with its marker, is ever replaced.
    """
    if not path.resolve().name:
        raise UsageError(f"{path} is the root of the file system. Choose another output folder.")
    if path.is_symlink():
        raise UsageError(f"{path} is a symbolic link. Give the folder itself.")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file. Choose another output folder.")
    if path.is_dir() and any(path.iterdir()):
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
    parent = _nearest_parent(path)
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{path} cannot be created: {parent} is not writable.")


def check_space(path: Path, wanted: int, *, advice: str = "a smaller --dtype") -> None:
    """Make sure that the disk of ``path`` has ``wanted`` bytes free.

    Args:
        path: The output.
        wanted: Its bytes.
        advice: What to choose if it has less.

    Raises:
        StarmergeError: It has less.
    """
    free = shutil.disk_usage(_nearest_parent(path)).free
    if free < wanted:
        raise StarmergeError(
            f"{path} needs {wanted / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free. "
            f"Choose another disk, or {advice}."
        )


@contextmanager
def output_folder(
    path: Path, *, overwrite: bool = False, kind: Replaceable = MERGED_MODEL
) -> Iterator[Path]:
    """Yield a hidden folder beside ``path`` that takes its place when the block ends well.

    If the block raises, the folder is deleted; if the process is killed, it stays behind under its
    hidden name, ``.NAME.partial-…``. What stood under ``path`` is replaced only at the end.

    Raises:
        UsageError: Something that may not be replaced has appeared under ``path`` meanwhile.
        StarmergeError: The disk is full, or fails otherwise.
    """
    check_output(path, overwrite=overwrite, kind=kind)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    partial.chmod(0o777 & ~_UMASK)
    try:
        yield partial
        for member in partial.rglob("*"):
            if member.is_dir():
                _sync(member)
            else:
                member.chmod(0o666 & ~_UMASK)  # some libraries write files for the owner alone
        _sync(partial)
        check_output(path, overwrite=overwrite, kind=kind)
        replaced = partial.with_name(partial.name.replace(".partial-", ".replaced-", 1))
        if path.exists():
            path.rename(replaced)
        try:
            partial.rename(path)
        except BaseException:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        _sync_one(path.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StarmergeError(
            f"{path} was not made: {error}. Nothing was left there; what stood there is kept."
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Make sure that a file may appear under ``path``.

    Raises:
        UsageError: Something stands there already that may not be replaced, or the folder cannot be
            written to.
    """
    if path.is_symlink() or path.is_dir() or not path.resolve().name:
        raise UsageError(f"{path} is a folder or a link. Give the file to write.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists. Choose another file, or replace it with --overwrite.")
    parent = _nearest_parent(path)
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{path} cannot be created: {parent} is not writable.")


@contextmanager
def output_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden file beside ``path`` that takes its place when the block ends well.

    If the block raises, the file is deleted; if the process is killed, it stays behind under its
    hidden name, ``.NAME.partial-…``. What stood under ``path`` is replaced only at the end.

    Raises:
        UsageError: Something that may not be replaced has appeared under ``path`` meanwhile.
        StarmergeError: The disk is full, or fails otherwise.
    """
    check_output_file(path, overwrite=overwrite)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        partial.chmod(0o666 & ~_UMASK)
        yield partial
        _sync_one(partial)
        check_output_file(path, overwrite=overwrite)
        partial.replace(path)
        _sync_one(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StarmergeError(
            f"{path} was not made: {error}. Nothing was left there; what stood there is kept."
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def leftovers(path: Path) -> list[Path]:
    """List the hidden folders that killed runs left beside ``path``."""
    path = path.resolve()
    return sorted(path.parent.glob(f".{path.name}.partial-*"))


@dataclass
class _Place:
    """Where a tensor belongs."""

    tensor: OutputTensor
    file: int
    """Descriptor of its shard."""
    offset: int
    """Of its first byte."""
    left: int
    """Bytes still to be written."""
    hashed: int
    """Bytes that the digest knows: all, if the pieces came one after the other."""
    digest: Any
    """BLAKE3 of the first of them."""
    lock: Lock
    """Of the digest."""


class ShardWriter:
    """Writes safetensors shards, each tensor into its place, in any order and by several threads.

    Files that an interrupted run left in the folder are taken up: what is not written again stays.
    The headers come first in the files, so all names, dtypes and shapes are given at the start.
    Nothing is held in memory, and what is written goes on to the disk meanwhile.

    Args:
        folder: Where the shards go.
        tensors: What will be written, in the order of the files.
        shard_bytes: Largest shard; a larger tensor gets one of its own.
        stem: What the files' names begin with.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[OutputTensor],
        *,
        shard_bytes: int = SHARD_BYTES,
        stem: str = "model",
    ) -> None:
        self._folder = folder
        self._stem = stem
        self._shards = list(_split(tensors, shard_bytes))
        self._files: list[int] = []
        self._places: dict[str, _Place] = {}
        self._behind = WriteBehind()
        self._lock = Lock()

    def __enter__(self) -> ShardWriter:
        try:
            self._lay_out()
        except BaseException:
            self._close()
            raise
        return self

    def _lay_out(self) -> None:
        """Open the shards and write their headers."""
        for number, tensors in enumerate(self._shards):
            file = os.open(self._folder / self._name(number), os.O_CREAT | os.O_RDWR, 0o666)
            self._files.append(file)
            header = _header(tensors)
            write_at(file, memoryview(header), 0)
            offset = len(header)
            for tensor in tensors:
                digest = blake3(max_threads=1)
                place = _Place(tensor, file, offset, tensor.nbytes, 0, digest, Lock())
                self._places[tensor.name] = place
                offset += tensor.nbytes
            os.ftruncate(file, offset)

    def _close(self) -> None:
        for file in self._files:
            os.close(file)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._behind.finish()
            else:
                self._behind.abandon()
        finally:
            self._close()
        if kind is None:
            missing = [name for name, place in self._places.items() if place.left]
            if missing:
                raise RuntimeError(f"Not all tensors were written: {missing[0]} is missing.")
            self._write_index()

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Write a tensor, or a piece of it, given as it is to be stored.

        Args:
            name: The tensor.
            tensor: Its entries, or some that follow each other in memory.
            start: Number of the first of them.
        """
        place = self._places[name]
        offset = start * tensor.dtype.itemsize
        fits = offset + tensor.nbytes <= place.tensor.nbytes
        if tensor.dtype != place.tensor.dtype or not fits:
            raise RuntimeError(
                f"{name} is planned as {place.tensor}; {tensor.dtype} {tuple(tensor.shape)} at "
                f"entry {start} does not fit."
            )
        content = raw_bytes(tensor.contiguous())
        write_at(place.file, content, place.offset + offset)
        with place.lock:
            if place.hashed == place.tensor.nbytes:  # it is written anew
                place.hashed, place.digest = 0, blake3(max_threads=1)
            if offset == place.hashed:
                place.digest.update(content)
                place.hashed += tensor.nbytes
        self._wrote(place, tensor.nbytes)

    def copy(self, name: str, source: Checkpoint) -> None:
        """Write a tensor by copying its bytes from a checkpoint."""
        place = self._places[name]
        source.copy(name, place.file, place.offset)
        place.hashed, place.digest = place.tensor.nbytes, _digest(place)
        self._wrote(place, place.tensor.nbytes)

    def digest(self, name: str) -> str:
        """Return the BLAKE3 of the bytes of a tensor that was written, in hexadecimal.

        Bytes that came out of their order are read back for it.
        """
        place = self._places[name]
        if place.hashed < place.tensor.nbytes:
            place.hashed, place.digest = place.tensor.nbytes, _digest(place)
        digest: str = place.digest.hexdigest()
        return digest

    def holds(self, name: str, digest: str) -> bool:
        """Tell whether a tensor lies in its place already, by the BLAKE3 of its bytes."""
        place = self._places[name]
        place.hashed, place.digest = place.tensor.nbytes, _digest(place)
        return self.digest(name) == digest

    def take_up(self, name: str) -> None:
        """Count a tensor that lies in its place already as written."""
        self._places[name].left = 0

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        for file in self._files:
            os.fsync(file)

    @property
    def digests(self) -> dict[str, dict[str, str]]:
        """The BLAKE3 of every tensor's bytes, by the name of its file and its own."""
        return {
            self._name(number): {tensor.name: self.digest(tensor.name) for tensor in shard}
            for number, shard in enumerate(self._shards)
        }

    def _wrote(self, place: _Place, nbytes: int) -> None:
        with self._lock:
            place.left -= nbytes
        self._behind.wrote(place.file, nbytes)

    def _name(self, shard: int) -> str:
        count = len(self._shards)
        if count == 1:
            return f"{self._stem}.safetensors"
        return f"{self._stem}-{shard + 1:05d}-of-{count:05d}.safetensors"

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        members = [tensor for shard in self._shards for tensor in shard]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in members)},
            "weight_map": {
                tensor.name: self._name(number)
                for number, shard in enumerate(self._shards)
                for tensor in shard
            },
        }
        write_json(self._folder / f"{self._stem}.safetensors.index.json", index)


def _digest(place: _Place) -> Any:
    """Return the BLAKE3 of the bytes that lie in a tensor's place."""
    digest = blake3(max_threads=1)
    for start in range(0, place.tensor.nbytes, _PIECE):
        count = min(_PIECE, place.tensor.nbytes - start)
        digest.update(os.pread(place.file, count, place.offset + start))
    return digest


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, indented, in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _split(tensors: Sequence[OutputTensor], limit: int) -> Iterator[list[OutputTensor]]:
    shard: list[OutputTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _nearest_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()
"""Read once: to read it is to set it, for all threads."""


def _sync(folder: Path) -> None:
    """Make a folder's files and their names survive a power cut, where the system can."""
    for path in [*(file for file in folder.iterdir() if file.is_file()), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
