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
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from starmerge.checkpoints.tensors import DTYPE_CODES, Checkpoint, raw_bytes
from starmerge.errors import StarmergeError, UsageError

REPORT = "merge_report.json"
"""The report in a merged model's folder; a folder that has it was written by a merge."""

SHARD_BYTES = 5 * 10**9
"""Largest shard, as transformers writes them; a larger tensor gets a shard of its own."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor as it will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def check_output(path: Path, *, overwrite: bool) -> None:
    """Make sure that a folder may appear under ``path``.

    Raises:
        UsageError: Something stands there already that may not be replaced, or the parent cannot
            be written to. Only what a merge has written, with its report, is ever replaced.
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
        if not (path / REPORT).is_file():
            raise UsageError(
                f"{path} holds no {REPORT}, so it is no merged model and is not overwritten. "
                "Choose another folder, or delete it yourself."
            )
    parent = _nearest_parent(path)
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{path} cannot be created: {parent} is not writable.")


def check_space(path: Path, wanted: int) -> None:
    """Make sure that the disk of ``path`` has ``wanted`` bytes free.

    Raises:
        StarmergeError: It has less.
    """
    free = shutil.disk_usage(_nearest_parent(path)).free
    if free < wanted:
        raise StarmergeError(
            f"{path} needs {wanted / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free. "
            "Choose another disk, or a smaller --dtype."
        )


@contextmanager
def output_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside ``path`` that takes its place when the block ends well.

    If the block raises, the folder is deleted; if the process is killed, it stays behind under its
    hidden name, ``.NAME.partial-…``. What stood under ``path`` is replaced only at the end.

    Raises:
        UsageError: Something that may not be replaced has appeared under ``path`` meanwhile.
        StarmergeError: The disk is full, or fails otherwise.
    """
    check_output(path, overwrite=overwrite)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    partial.chmod(0o777 & ~_umask())
    try:
        yield partial
        for member in partial.rglob("*"):
            if member.is_dir():
                _sync(member)
            else:
                member.chmod(0o666 & ~_umask())  # some libraries write files for the owner alone
        _sync(partial)
        check_output(path, overwrite=overwrite)
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
        _sync(path.parent, files=False)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StarmergeError(
            f"{path} was not made: {error}. Nothing was left there; what stood there is kept."
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def leftovers(path: Path) -> list[Path]:
    """List the hidden folders that killed runs left beside ``path``."""
    path = path.resolve()
    return sorted(path.parent.glob(f".{path.name}.partial-*"))


class ShardWriter:
    """Writes safetensors shards, one tensor after the other, in an order fixed beforehand.

    The headers come first in the files, so all names, dtypes and shapes are given at the start;
    the tensors' bytes follow as they are made. Nothing is held in memory.

    Args:
        folder: Where the shards go.
        tensors: What will be written, in this order.
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
        self._queue = iter(
            [(shard, tensor) for shard, members in enumerate(self._shards) for tensor in members]
        )
        self._current = -1
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()
        if kind is None:
            if next(self._queue, None) is not None:
                raise RuntimeError("Not all tensors were written.")
            self._write_index()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, given as it is to be stored."""
        planned = self._turn_to(name)
        if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape:
            raise RuntimeError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {planned}.")
        self._open_file.write(raw_bytes(tensor.contiguous()))

    def copy(self, name: str, source: Checkpoint) -> None:
        """Write the next tensor by copying its bytes from a checkpoint."""
        self._turn_to(name)
        source.copy(name, self._open_file)

    @property
    def _open_file(self) -> BinaryIO:
        assert self._file is not None
        return self._file

    def _turn_to(self, name: str) -> OutputTensor:
        shard, tensor = next(self._queue)
        if tensor.name != name:
            raise RuntimeError(f"{name} was written out of order; {tensor.name} is next.")
        if shard != self._current:
            self._close()
            self._current = shard
            self._file = (self._folder / self._name(shard)).open("wb")
            self._file.write(_header(self._shards[shard]))
        return tensor

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

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


def _sync(folder: Path, *, files: bool = True) -> None:
    """Make a folder's names, and its files, survive a power cut, where the system can."""
    members = [file for file in folder.iterdir() if file.is_file()] if files else []
    for path in [*members, folder]:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
