"""BLAKE3 of files, tensors and updates, with a cache for the files of this process."""

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


def cached_blake3_of(file: Place) -> str:
    """Return the BLAKE3 of a file's content, cached per process while the file is unchanged."""
    state = storage_of(file).state(file)
    if state.identity in _remembered:
        return _remembered[state.identity]
    digest = blake3_of(file)
    if state.is_settled:
        _remembered[state.identity] = digest
    return digest


def blake3_of_tensor(tensor: Tensor) -> blake3:
    """Return the BLAKE3 of a tensor's bytes in row-major order; one thread."""
    digest = blake3(max_threads=1)
    for piece in _pieces(tensor):
        digest.update(piece)
    return digest


def cached_blake3_of_tensor(info: TensorInfo) -> str:
    """Return the BLAKE3 of a tensor's bytes in row-major order, in hexadecimal.

    The hash of a stored tensor is cached per process while the file is unchanged.
    """
    if not info.is_stored:
        return str(blake3_of_tensor(read_tensor(info)).hexdigest())
    state = storage_of(info.file).state(info.file)
    known = _remembered.get(_key(info, state)) or _hash_from_storage(info, state)
    return known or _hash_and_remember(info, state, read_tensor(info))


def read_and_hash(info: TensorInfo) -> tuple[Tensor, str]:
    """Return a tensor, and the same hash as :func:`cached_blake3_of_tensor`."""
    if not info.is_stored:  # a renamed or derived tensor
        tensor = read_tensor(info)
        return tensor, str(blake3_of_tensor(tensor).hexdigest())
    # Take the file's state before reading, because the file may be replaced at any time.
    state = storage_of(info.file).state(info.file)
    tensor = read_tensor(info)
    known = _remembered.get(_key(info, state)) or _hash_from_storage(info, state)
    return tensor, known or _hash_and_remember(info, state, tensor)


def _key(info: TensorInfo, state: FileState) -> tuple[int | str, ...]:
    return *state.identity, info.name


def _hash_from_storage(info: TensorInfo, state: FileState) -> str | None:
    """Return the hash that the storage computed when it fetched a tensor; None without one."""
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
    """The description of a stored or planned tensor."""

    @property
    def name(self) -> str:
        """Name of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""


def blake3_of_contents(tensors: Iterable[tuple[Layout, str]]) -> str:
    """Return one BLAKE3 of several tensors, such as those of a file.

    It is the hash of one line of JSON per tensor, sorted by name, with its name, dtype and shape,
    and the BLAKE3 of its bytes. So the hash of a file can be computed from the results of several
    processes.

    Args:
        tensors: Tensors, each with the BLAKE3 of its bytes in row-major order, in hexadecimal.
    """
    digest = blake3(max_threads=1)
    for info, own in sorted(tensors, key=lambda entry: entry[0].name):
        line = json.dumps([info.name, str(info.dtype), list(info.shape), own])
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def blake3_of_update(update: Mapping[str, Delta]) -> str:
    """Return the BLAKE3 of an update in memory: of its tensors' names, shapes, dtypes and values.

    The hash covers the factors of a low-rank delta and the stored tensors of a lazy difference; no
    matrix is computed. So equal updates in different representations have different hashes, and
    different updates always have different hashes. The order of the tensors does not matter.

    Args:
        update: The delta of each tensor, by name; hashed at some 3 GB/s.
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
    """Return the numbers and the tensors that represent a delta."""
    if isinstance(delta, LowRank):
        return [float(delta.scale).hex()], [delta.B, delta.A]
    if isinstance(delta, Stored):
        factors = [delta.factor, *(c for c, _ in delta.terms)]
        return [float(c).hex() for c in factors], [delta.base, *(tuned for _, tuned in delta.terms)]
    return [], [delta.tensor]


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in row-major order, in chunks if they must be copied."""
    rows = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    if not rows.numel():
        return
    step = len(rows) if rows.is_contiguous() else max(1, _CHUNK // rows[0].nbytes)
    for start in range(0, len(rows), step):
        # Flatten, because torch treats a single column as contiguous for any last stride.
        piece = rows[start : start + step].cpu().contiguous().flatten()
        yield piece.view(torch.uint8).numpy().data.cast("B")
