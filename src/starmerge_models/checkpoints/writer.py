"""Writer of safetensors shards, tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from threading import Lock
from types import TracebackType
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from starmerge_models.checkpoints.experts import name_in_file
from starmerge_models.checkpoints.hashing import cached_blake3_of_tensor
from starmerge_models.checkpoints.tensors import DTYPE_CODES, Checkpoint, raw_bytes
from starmerge_models.storage import OutputFile, OutputFolder
from starmerge_models.storage.storage import ShortFileError
from starmerge_models.storage.write_behind import WriteBehind

SHARD_BYTES = 5 * 10**9
"""Largest shard, as in transformers; a larger tensor gets its own shard."""

_PIECE = 2**23
"""Bytes of one read for hashing written data."""


@dataclass(frozen=True)
class OutputTensor:
    """Name, dtype and shape of a tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class _Shard:
    """A file of several tensors."""

    name: str
    """Path relative to the output."""
    size: int
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True)
class _Place:
    """The place of a tensor in a shard."""

    tensor: OutputTensor
    shard: int
    offset: int
    """Offset of its first byte in the shard."""


@dataclass
class _Progress:
    """The progress of this process in writing a tensor."""

    left: int
    """Remaining bytes."""
    hashed: int = 0
    """Number of hashed bytes: all of them if the pieces were written in order."""
    hash: Any = None
    """Running BLAKE3 of the first bytes; None while a thread updates it, and at the end."""
    digest: str | None = None
    """BLAKE3 of all bytes, in hexadecimal."""


class ShardWriter:
    """Writes the tensors of safetensors shards in any order, from several threads.

    The headers are at the beginning of the files, so all names, dtypes and shapes are given to the
    constructor. Tensors are not buffered, and written data is synced to the disk in the background.
    A writer can be pickled, and several processes can write to the same files. Tensors of an
    interrupted run are kept unless they are written again. As a context manager it creates the
    files and closes them.

    Args:
        folder: The output.
        tensors: The tensors to write, in the order of the files.
        shard_bytes: Largest shard; a larger tensor gets its own shard.
        stem: Prefix of the files' names, with a subfolder of the output if any, such as
            ``unified/model``.
        metadata: Metadata of the headers.
    """

    def __init__(
        self,
        folder: OutputFolder,
        tensors: Sequence[OutputTensor],
        *,
        shard_bytes: int = SHARD_BYTES,
        stem: str = "model",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._stem = stem
        self._metadata = {"format": "pt", **(metadata or {})}
        self._shards: list[_Shard] = []
        self._places: dict[str, _Place] = {}
        groups = list(_split(tensors, shard_bytes))
        for number, group in enumerate(groups):
            offset = len(_header(group, self._metadata))
            for tensor in group:
                self._places[tensor.name] = _Place(tensor, number, offset)
                offset += tensor.nbytes
            name = self._name(number, len(groups))
            self._shards.append(_Shard(name, offset, tuple(group)))
        self._begin()

    def _begin(self) -> None:
        self._files: dict[int, OutputFile] = {}
        self._written: dict[str, _Progress] = {}
        self._behind: WriteBehind | None = None
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_files", "_written", "_behind", "_lock")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __enter__(self) -> ShardWriter:
        self.lay_out()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(flush=kind is None)

    def lay_out(self) -> None:
        """Create the shards with their headers, and the index."""
        try:
            for number, shard in enumerate(self._shards):
                self._file(number).write(memoryview(_header(shard.tensors, self._metadata)), 0)
        except BaseException:
            self.close(flush=False)
            raise
        if len(self._shards) > 1:
            whole = sum(place.tensor.nbytes for place in self._places.values())
            files = {
                _name_in_file(place.tensor): self._shards[place.shard].name
                for place in self._places.values()
            }
            index = {
                "metadata": {"total_size": whole},
                "weight_map": {name: file.rpartition("/")[2] for name, file in files.items()},
            }
            self._folder.put(f"{self._stem}.safetensors.index.json", json_bytes(index))

    def close(self, *, flush: bool = True) -> None:
        """Close the files.

        Args:
            flush: Sync the data that this process has written to the disk first.

        Raises:
            OSError: The storage failed.
        """
        behind, self._behind = self._behind, None
        files, self._files = self._files, {}
        try:
            if behind is not None:
                behind.finish() if flush else behind.abandon()
        finally:
            for file in files.values():
                file.close()

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Write a tensor or a piece of it, in the dtype of the output.

        Args:
            name: The tensor.
            tensor: Its entries, or a contiguous piece of them.
            start: Index of the first entry of the piece.
        """
        place, progress = self._places[name], self._progress(name)
        offset = start * tensor.dtype.itemsize
        fits = offset + tensor.nbytes <= place.tensor.nbytes
        if tensor.dtype != place.tensor.dtype or not fits:
            raise RuntimeError(
                f"{name} is planned as {place.tensor}; {tensor.dtype} {tuple(tensor.shape)} at "
                f"entry {start} does not fit."
            )
        content = raw_bytes(tensor.contiguous())
        with self._lock:
            if not progress.left:  # the tensor is written again
                progress.left, progress.digest = place.tensor.nbytes, None
        more = progress.left > tensor.nbytes
        self._file(place.shard).write(content, place.offset + offset, more=more)
        with self._lock:
            if not offset:
                progress.hashed, progress.hash = 0, blake3(max_threads=1)
            follows = progress.hash if offset == progress.hashed else None
            if follows is not None:  # this thread owns the hash until it has updated it
                progress.hash = None
        if follows is not None:
            follows.update(content)
        with self._lock:
            progress.left -= tensor.nbytes
            if follows is not None:
                progress.hashed += tensor.nbytes
                progress.hash = follows
                if progress.hashed == place.tensor.nbytes:
                    # Free the hash, which takes kilobytes, because there may be many tensors.
                    progress.digest, progress.hash = follows.hexdigest(), None
        self._wrote(place, tensor.nbytes)

    def copy(self, name: str, source: Checkpoint) -> str:
        """Write a tensor by copying its bytes from a checkpoint.

        Returns:
            The BLAKE3 of the bytes, computed from the source.
        """
        if source[name].bytes_computed:  # compute or fetch the tensor once, for both
            self.write(name, source.read(name))
            return self.digest(name)
        place, progress = self._places[name], self._progress(name)
        digest = cached_blake3_of_tensor(source[name])
        source.copy(name, self._file(place.shard), place.offset)
        progress.digest, progress.left = digest, 0
        self._wrote(place, place.tensor.nbytes)
        return digest

    def digest(self, name: str) -> str:
        """Return the BLAKE3 of a tensor that this process has written, in hexadecimal.

        Data that was not written in order is read back.
        """
        progress = self._progress(name)
        if progress.left:
            raise RuntimeError(f"{name} was not written whole: {progress.left} bytes are missing.")
        if progress.digest is None:
            progress.digest = self._stored(name)
        return progress.digest

    def holds(self, name: str, digest: str) -> bool:
        """Return whether the shard already contains a tensor with this BLAKE3."""
        try:
            return self._stored(name) == digest
        except ShortFileError:
            return False

    def sync(self, names: Iterable[str]) -> None:
        """Sync tensors that any process of this machine has written to the disk."""
        for shard in sorted({self._places[name].shard for name in names}):
            self._file(shard).sync()

    def by_file(self, digests: Mapping[str, str]) -> dict[str, list[tuple[OutputTensor, str]]]:
        """Return tensors with their digests by file, relative to the output.

        Args:
            digests: BLAKE3 of tensors by name.
        """
        return {
            shard.name: [(t, digests[t.name]) for t in shard.tensors if t.name in digests]
            for shard in self._shards
        }

    def _file(self, shard: int) -> OutputFile:
        with self._lock:
            if shard not in self._files:
                found = self._shards[shard]
                self._files[shard] = self._folder.open(found.name, found.size)
            return self._files[shard]

    def _progress(self, name: str) -> _Progress:
        with self._lock:
            if name not in self._written:
                self._written[name] = _Progress(self._places[name].tensor.nbytes)
            return self._written[name]

    def _wrote(self, place: _Place, nbytes: int) -> None:
        file = self._file(place.shard)
        with self._lock:
            if self._behind is None:
                self._behind = WriteBehind()
            behind = self._behind
        behind.wrote(file, nbytes)

    def _stored(self, name: str) -> str:
        """Return the BLAKE3 of the bytes at a tensor's place in the file."""
        place = self._places[name]
        file = self._file(place.shard)
        digest = blake3(max_threads=1)
        for start in range(0, place.tensor.nbytes, _PIECE):
            count = min(_PIECE, place.tensor.nbytes - start)
            digest.update(file.read(place.offset + start, count))
        return str(digest.hexdigest())

    def _name(self, number: int, count: int) -> str:
        if count == 1:
            return f"{self._stem}.safetensors"
        return f"{self._stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return JSON, indented, in UTF-8; bytes of file names that are not UTF-8 are escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def _split(tensors: Sequence[OutputTensor], limit: int) -> Iterator[list[OutputTensor]]:
    shard: list[OutputTensor] = []
    size = 0
    for _, group in groupby(tensors, _name_in_file):
        own = list(group)
        nbytes = sum(tensor.nbytes for tensor in own)
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard += own
        size += nbytes
    yield shard


def _name_in_file(tensor: OutputTensor) -> str:
    return name_in_file(tensor.name)


def _header(tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, group in groupby(tensors, _name_in_file):
        own = list(group)
        nbytes = sum(tensor.nbytes for tensor in own)
        shape = own[0].shape if name == own[0].name else (len(own), *own[0].shape)
        entries[name] = {
            "dtype": DTYPE_CODES[own[0].dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
