"""BLAKE3 of files and updates: one way to hash, and a memory of the files of this process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from blake3 import blake3
from torch import Tensor

from starmerge_models.checkpoints.tensors import StoredTensor, TensorInfo, read_tensor
from starmerge_models.deltas import Delta, LowRank, Stored, matrix_shape
from starmerge_models.storage import FileState, Place, storage_of

_CHUNK = 2**20

_remembered: dict[tuple[int | str, ...], str] = {}


def blake3_of(file: Place) -> str:
    """Return the BLAKE3 of a file's content, in hexadecimal; one thread, some 3 GB/s in memory."""
    digest = blake3(max_threads=1)
    with storage_of(file).stream(file) as stream:
        buffer = bytearray(_CHUNK)
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def remembered_blake3_of(file: Place) -> str:
    """Return the BLAKE3 of a file's content, read once a process while the file stays as it is."""
    state = storage_of(file).state(file)
    if state.identity in _remembered:
        return _remembered[state.identity]
    digest = blake3_of(file)
    if state.is_settled:
        _remembered[state.identity] = digest
    return digest


def blake3_of_tensor(tensor: Tensor) -> blake3:
    """Return the BLAKE3 of a tensor's bytes, row after row; one thread."""
    digest = blake3(max_threads=1)
    for piece in _pieces(tensor):
        digest.update(piece)
    return digest


def remembered_blake3_of_tensor(info: TensorInfo) -> str:
    """Return the BLAKE3 of a tensor's bytes, row after row, in hexadecimal.

    That of a tensor of a file is computed once a process while the file stays as it is.
    """
    if not info.is_stored:
        return str(blake3_of_tensor(read_tensor(info)).hexdigest())
    state = storage_of(info.file).state(info.file)
    known = _remembered.get(_key(info, state)) or _taken_while_read(info, state)
    return known or _hash_and_remember(info, state, read_tensor(info))


def read_and_hash(info: TensorInfo) -> tuple[Tensor, str]:
    """Return a tensor, and the same hash as :func:`remembered_blake3_of_tensor`."""
    if not info.is_stored:  # its name is not the one that it has in the file
        tensor = read_tensor(info)
        return tensor, str(blake3_of_tensor(tensor).hexdigest())
    # The state of the file before it is read: another may take its name at any time.
    state = storage_of(info.file).state(info.file)
    tensor = read_tensor(info)
    known = _remembered.get(_key(info, state)) or _taken_while_read(info, state)
    return tensor, known or _hash_and_remember(info, state, tensor)


def _key(info: TensorInfo, state: FileState) -> tuple[int | str, ...]:
    return *state.identity, info.name


def _taken_while_read(info: TensorInfo, state: FileState) -> str | None:
    """Return the hash that the storage has taken of a tensor's bytes as it fetched them."""
    if not isinstance(info, StoredTensor) or info.stride is not None or not state.is_settled:
        return None
    digest = storage_of(info.file).digest(info.file, info.offset, info.nbytes)
    if digest is not None:
        _remembered[_key(info, state)] = digest
    return digest


def _hash_and_remember(info: TensorInfo, state: FileState, tensor: Tensor) -> str:
    digest: str = blake3_of_tensor(tensor).hexdigest()
    if state.is_settled:
        _remembered[_key(info, state)] = digest
    return digest


class Layout(Protocol):
    """What describes a tensor that is stored, or will be."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


def blake3_of_contents(tensors: Iterable[tuple[Layout, str]]) -> str:
    """Return one BLAKE3 of some tensors, such as those of a file.

    That of a line of JSON for each, sorted by name: its name, dtype and shape, and the BLAKE3 of
    its bytes. So the hash of a file can be put together from what several processes have read.

    Args:
        tensors: Each with the BLAKE3 of its bytes, row after row, in hexadecimal.
    """
    digest = blake3(max_threads=1)
    for info, own in sorted(tensors, key=lambda entry: entry[0].name):
        line = json.dumps([info.name, str(info.dtype), list(info.shape), own])
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def blake3_of_update(update: Mapping[str, Delta]) -> str:
    """Return the BLAKE3 of an update in memory: of its tensors' names, shapes, dtypes and values.

    What is hashed are the factors of a low-rank delta and the stored tensors of a difference, as
    they are held: no matrix is formed. So one update held in two ways has two hashes, but two
    updates never have one. The order of the tensors does not count.

    Args:
        update: What is added to each tensor, by name; some 3 GB/s of what is held.
    """
    digest = blake3(max_threads=1)
    for name in sorted(update):
        factors, tensors = _held(update[name])
        layouts = [(str(tensor.dtype), list(tensor.shape)) for tensor in tensors]
        head = json.dumps([name, type(update[name]).__name__, factors, layouts])
        digest.update(len(head.encode()).to_bytes(8, "little") + head.encode())
        for tensor in tensors:
            for piece in _pieces(tensor):
                digest.update(piece)
    return digest.hexdigest()


def _held(delta: Delta) -> tuple[list[str], list[Tensor]]:
    """Return the numbers and the tensors that a delta is made of."""
    if isinstance(delta, LowRank):
        return [float(delta.scale).hex()], [delta.B, delta.A]
    if isinstance(delta, Stored):
        factors = [delta.factor, *(c for c, _ in delta.terms)]
        return [float(c).hex() for c in factors], [delta.base, *(tuned for _, tuned in delta.terms)]
    return [], [delta.tensor]


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, row after row, some at a time where they must be copied."""
    rows = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    if not rows.numel():
        return
    step = len(rows) if rows.is_contiguous() else max(1, _CHUNK // rows[0].nbytes)
    for start in range(0, len(rows), step):
        # Flat, as torch takes a single column for contiguous whatever its last stride is.
        piece = rows[start : start + step].cpu().contiguous().flatten()
        yield piece.view(torch.uint8).numpy().data.cast("B")
