"""Provenance of a merge: hashes of its inputs, computed when the tensors are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from starmerge_models.checkpoints.hashing import (
    blake3_of_contents,
    cached_blake3_of,
    cached_blake3_of_tensor,
)
from starmerge_models.checkpoints.tensors import Checkpoint, TensorInfo, prefetch, stored_of
from starmerge_models.merging.executors.executor import Executor
from starmerge_models.merging.plan import Input, Plan
from starmerge_models.merging.work import check_reachable
from starmerge_models.progress import progress_bar
from starmerge_models.storage import Place

Key: TypeAlias = tuple[Place, str]
"""Key of a tensor: its file, and its name in the file."""

Hashes: TypeAlias = Mapping[Key, str]
"""BLAKE3 of the bytes of tensors, in row-major order."""


def key_of(info: TensorInfo) -> Key:
    """Return the key of a tensor."""
    return info.file, info.name


@dataclass(frozen=True)
class HashJob:
    """A job that hashes tensors.

    Args:
        tensors: Entries of the tensors in their files' headers.
    """

    tensors: tuple[TensorInfo, ...]

    @contextmanager
    def open(self) -> Iterator[Callable[[int], str]]:
        """Yield a function that hashes the tensor of a number."""
        yield lambda number: cached_blake3_of_tensor(self.tensors[number])

    def memory(self, number: int) -> int:
        """Return 0, because tensors are memory-mapped."""
        return 0

    def nbytes(self, number: int) -> int:
        """Return the bytes of a tensor."""
        return self.tensors[number].nbytes

    def announce(self, number: int) -> None:
        """Prefetch a tensor."""
        prefetch(self.tensors[number])

    def check(self) -> None:
        """Check, on another machine, that the files are reachable."""
        for file in {info.file for info in self.tensors}:
            check_reachable(file)

    def label(self, number: int) -> str:
        """Return the tensor's name."""
        return f"the tensor {self.tensors[number].name}"


def input_hashes(
    plan: Plan, executor: Executor, known: Hashes, *, progress: bool
) -> list[dict[str, Any]]:
    """Return the hashes of each input of a plan, by the names of its files.

    ``tensors`` contains the hashes of checkpoints, see :func:`blake3_of_contents`; ``blake3``
    contains those of whole other files. Tensors that the merge has not hashed are read now. A base
    of which no tensor was read does not affect the merge and has no hashes.

    Args:
        plan: The plan.
        executor: The executor of the hashing.
        known: Hashes that the merge has computed.
        progress: Show a progress bar on standard error.
    """
    inputs = plan.inputs
    wanted = {
        key_of(info): info
        for given in inputs
        for checkpoint in _relevant_checkpoints(given, known)
        for info in stored_of(checkpoint.values())
    }
    left = tuple(info for key, info in wanted.items() if key not in known)
    found = dict(known)
    if left:
        size = sum(info.nbytes for info in left)
        with (
            progress_bar(
                "hashing inputs", size, show=progress, in_bytes=True, tensors=len(left)
            ) as phase,
            closing(executor.run(HashJob(left), range(len(left)))) as digests,
        ):
            for info, digest in zip(left, digests, strict=True):
                found[key_of(info)] = digest
                phase.tensor_done(info.name, info.nbytes)
    return [
        {
            "blake3": {given.label(file): cached_blake3_of(file) for file in given.other_files},
            "tensors": {
                given.label(file): digest
                for checkpoint in _relevant_checkpoints(given, known)
                for file, digest in contents_of(checkpoint, found).items()
            },
        }
        for given in inputs
    ]


def contents_of(checkpoint: Checkpoint, hashes: Hashes) -> dict[Place, str]:
    """Return the hash of the tensors in each file of a checkpoint."""
    stored: dict[Place, list[tuple[TensorInfo, str]]] = {}
    for info in stored_of(checkpoint.values()):
        stored.setdefault(info.file, []).append((info, hashes[key_of(info)]))
    return {file: blake3_of_contents(tensors) for file, tensors in stored.items()}


def _relevant_checkpoints(given: Input, known: Hashes) -> list[Checkpoint]:
    return [
        own
        for own in given.checkpoints
        if given.kind != "base" or any(key_of(info) in known for info in stored_of(own.values()))
    ]
