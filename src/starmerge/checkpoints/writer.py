"""Writing a model: shards, tensor by tensor."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
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
    """Write a JSON file, indented, in UTF-8; bytes of file names that are not UTF-8 are escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


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
