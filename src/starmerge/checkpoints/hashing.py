"""BLAKE3 of files and updates: one way to hash, and a memory of the files of this process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event

import torch
from blake3 import blake3
from torch import Tensor

from starmerge.deltas import Delta, LowRank, Stored, matrix_shape

_CHUNK = 2**20

_SETTLED = 2 * 10**9
"""Nanoseconds. Some file systems stamp times no finer than that, so a file that changed less long
ago may change again and keep its stamp."""

_remembered: dict[tuple[int, ...], str] = {}


def blake3_of(file: Path, stopped: Event | None = None) -> str:
    """Return the BLAKE3 of a file's content, in hexadecimal; one thread, some 3 GB/s in memory.

    Args:
        file: The file.
        stopped: Once set, the rest of the file is left out: the result is of no use then.
    """
    digest = blake3(max_threads=1)
    with file.open("rb", buffering=0) as stream:
        buffer = bytearray(_CHUNK)
        while not (stopped and stopped.is_set()) and (count := stream.readinto(buffer)):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def remembered_blake3_of(file: Path, stopped: Event | None = None) -> str:
    """Return the BLAKE3 of a file's content, read once a process while the file stays as it is.

    A file is known again by device, inode, size, and the times of its last changes.

    Args:
        file: The file.
        stopped: As for :func:`blake3_of`; nothing is remembered then.
    """
    status = file.stat()
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key in _remembered:
        return _remembered[key]
    is_settled = changed < time.time_ns() - _SETTLED
    digest = blake3_of(file, stopped)
    if is_settled and not (stopped and stopped.is_set()):
        _remembered[key] = digest
    return digest


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
