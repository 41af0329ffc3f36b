"""A task of an EMR merge: a mask and a number that make its delta of a vector all tasks share.

The merge's folder holds ``unified``, shards of the vector τ_uni, and a folder for each task::

    emr.json            format, task, base, the rescaler λ, where ``unified`` lies, the output layer
                        that the merge untied from the embedding
    mask.safetensors    M, for each tensor the task changes

A mask is a vector of bytes, each of eight entries of the tensor in row-major order, the first in
the highest bit; its shape is that of τ_uni. A merge may change some of the experts of one tensor
alone, so each of them stands for itself here: ``NAME[3]`` is called ``NAME.3``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.experts import stack_of
from starmerge_models.checkpoints.opening import open_checkpoint, open_safetensors
from starmerge_models.checkpoints.source import Source
from starmerge_models.checkpoints.tensors import MERGEABLE, Checkpoint, TensorInfo
from starmerge_models.checkpoints.writer import OutputTensor, ShardWriter, json_bytes
from starmerge_models.deltas import Dense, compute_dtype
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.reading import read_json
from starmerge_models.storage import OutputFolder, Place, exists
from starmerge_models.storage.publishing import REPORT

TASK_FILE = "emr.json"
UNIFIED = "unified"

_FORMAT = 1
_STEM = "mask"
_TAKEN = (UNIFIED, REPORT, "README.md")


@dataclass(frozen=True)
class EmrTask:
    """The model of one task of an EMR merge; its deltas are dense."""

    kind = "EMR task"

    name: str
    source: Source
    rescaler: float
    """λ."""
    unified: Checkpoint
    """τ_uni."""
    masks: Checkpoint
    """M, packed to eight entries per byte."""
    base_name: str | None
    """Hub id of the base of the merge."""
    notes: tuple[str, ...] = ()
    """Empty: models of a merge need no notes."""
    untied: str | None = None
    """The base's name of the output layer, if the base ties it and the model does not."""

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the base's tensors that the task changes."""
        return frozenset(self.masks)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The masks and the unified vector."""
        return [self.masks, self.unified]

    @property
    def other_files(self) -> list[Place]:
        """The file with the rescaler."""
        return [self.source.path / TASK_FILE]

    def inputs(self, tensor: str) -> list[TensorInfo]:
        """Return the tensors that are read for a tensor's delta."""
        return [self.unified[tensor], self.masks[tensor]]

    def rank(self, tensor: str) -> int | None:
        """Return None: the delta may have any rank."""
        return None

    def needs_base(self, tensor: str) -> bool:
        """Return False: the vector is a difference from the base."""
        return False

    def module(self, tensor: str) -> None:
        """Return None: the modules' names in PEFT are unknown."""

    def delta(self, tensor: str, base: Tensor | None) -> Dense:
        """Return λ · M ⊙ τ_uni in float32, or in float64 if τ_uni is float64.

        Args:
            tensor: Name of the tensor.
            base: The base's tensor, which is not used.
        """
        tau_uni = self.unified.read(tensor)
        M = unpack(self.masks.read(tensor), tuple(tau_uni.shape))
        scaled = tau_uni.to(compute_dtype(tau_uni.dtype)) * self.rescaler
        return Dense(scaled.masked_fill_(~M, 0.0))


def open_emr_task(name: str, source: Source, base: Base, *, any_base: bool = False) -> EmrTask:
    """Open a task of an EMR merge: its config, and the headers of its mask and of τ_uni.

    Args:
        name: The model's name in tables and reports.
        source: The task's folder.
        base: The base it is to be merged into.
        any_base: Accept a task whose merge had a base of another name.

    Raises:
        UsageError: The merge had another base, or the folder is of a later version.
        StarmergeError: A file is missing or broken, or does not fit the others or the base.
    """
    file = source.path / TASK_FILE
    content = read_json(file)
    if content.get("format") != _FORMAT:
        raise UsageError(
            f"{file}: the format is {content.get('format')!r}, and this starmerge reads {_FORMAT}. "
            "Install a later one, or repeat the merge."
        )
    rescaler: Any = content.get("rescaler")
    where = content.get("unified")
    if type(rescaler) not in (int, float) or not 0 <= rescaler < math.inf:
        raise StarmergeError(f"{file}: the rescaler is {rescaler!r:.200}, which is no factor.")
    if not isinstance(where, str):
        raise StarmergeError(f"{file} does not say where the unified vector lies, in 'unified'.")
    named = content.get("base_hub_id")
    base_name = named if isinstance(named, str) else None
    if not any_base:
        _check_base_name(file, base_name, base)
    folder = source.path / where
    if not exists(folder):
        raise StarmergeError(
            f"{source} needs the unified vector of its merge, and {folder} is missing. Keep the "
            "tasks' folders beside it, or say in 'unified' in emr.json where it lies."
        )
    masks = _by_base(open_safetensors(source.path / f"{_STEM}.safetensors"), base)
    unified = _by_base(open_checkpoint(folder), base)
    head = content.get("untied")
    # The caller then unties the base and opens the task again.
    is_untied = isinstance(head, str) and bool(base.tied) and head in masks
    task = EmrTask(
        name, source, float(rescaler), unified, masks, base_name, untied=head if is_untied else None
    )
    for tensor in masks:
        if tensor != task.untied or tensor in base.checkpoint:
            _check_tensor(task, folder, base, tensor)
    return task


def check_task_names(names: Sequence[str]) -> None:
    """Check that each task's name is valid for a folder next to the unified vector.

    Raises:
        UsageError: A name is invalid, or two names differ only in case.
    """
    seen = [name.casefold() for name in _TAKEN]
    for name in names:
        if name in (".", "..") or any(character in name for character in "/\\\0"):
            raise UsageError(
                f"The task {name!r} gets a folder of its name, which cannot be one. Give the model "
                "another: NAME=PATH, or name: in YAML."
            )
        if name.casefold() in seen:
            raise UsageError(
                f"The task {name!r} gets a folder of its name, which is taken by another, on some "
                "systems at least. Give the model another: NAME=PATH, or name: in YAML."
            )
        seen.append(name.casefold())


def stored_name(tensor: str) -> str:
    """Return the name of a tensor of the base in the unified vector and in masks."""
    joined = stack_of(tensor)
    return f"{joined[0]}.{joined[1]}" if joined else tensor


def mask_layout(tensor: TensorInfo) -> OutputTensor:
    """Return the layout of a tensor's stored mask."""
    nbytes = -(-tensor.size // 8)
    return OutputTensor(stored_name(tensor.name), torch.uint8, (nbytes,), nbytes)


def mask_writer(folder: OutputFolder, task: str, layouts: Sequence[OutputTensor]) -> ShardWriter:
    """Return the writer of a task's packed masks.

    Args:
        folder: The output, which contains the folders of all tasks.
        task: The task's name.
        layouts: Layouts of the masks of the tensors that the task changes, in the order of the
            file.
    """
    whole = sum(layout.nbytes for layout in layouts)
    return ShardWriter(folder, layouts, shard_bytes=whole, stem=f"{task}/{_STEM}")


def write_task(folder: OutputFolder, task: str, base: Base, rescaler: float) -> None:
    """Write ``emr.json`` into a task's folder.

    Args:
        folder: The output, which contains the unified vector and the folders of all tasks.
        task: The task's name.
        base: The base of the merge.
        rescaler: λ.
    """
    content: dict[str, Any] = {
        "format": _FORMAT,
        "task": task,
        "base": str(base.source),
        "base_hub_id": base.source.name,
        "rescaler": rescaler,
        "unified": f"../{UNIFIED}",
        "untied": base.head,
    }
    folder.put(f"{task}/{TASK_FILE}", json_bytes(content))


def pack(M: Tensor) -> Tensor:
    """Pack a mask to bytes, (⌈size/8⌉,) uint8."""
    return torch.from_numpy(np.packbits(M.numpy().reshape(-1)))


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unpack a mask of a given shape, bool, from its bytes."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    return torch.from_numpy(bits.view(np.bool_)).reshape(shape)


def _by_base(checkpoint: Checkpoint, base: Base) -> Checkpoint:
    """Return the unified vector, or masks, under the base's names."""
    experts = {stored_name(name): name for name in base.checkpoint if stack_of(name)}
    return checkpoint.viewed(
        info.renamed(experts[name]) if name in experts else info
        for name, info in checkpoint.items()
    )


def _check_base_name(file: Place, merged_on: str | None, base: Base) -> None:
    known = base.source.name
    if known and merged_on and merged_on.lower() != known.lower():
        raise UsageError(
            f"{file}: the merge was of {merged_on}, but the base is {known}. If both are the same "
            "weights, say so with --any-base."
        )


def _check_tensor(task: EmrTask, folder: Place, base: Base, tensor: str) -> None:
    mask = task.masks[tensor]
    if tensor not in task.unified:
        raise StarmergeError(
            f"{mask.file} masks the tensor {tensor}, which the unified vector {folder} lacks. They "
            "are not of one merge."
        )
    if tensor not in base.checkpoint:
        raise StarmergeError(
            f"{task.source} has the tensor {tensor}, which the base {base.source} lacks. Is it of "
            "a merge with that base?"
        )
    unified, ours = task.unified[tensor], base.checkpoint[tensor].shape
    if unified.shape != ours:
        raise StarmergeError(
            f"{task.source}: tensor {tensor} has the shape {list(unified.shape)}, in the base "
            f"{base.source} it is {list(ours)}. Is it of a merge with that base?"
        )
    if unified.dtype not in MERGEABLE:
        raise StarmergeError(f"{unified.file}: tensor {tensor} is stored in {unified.dtype}.")
    layout = mask_layout(unified)
    if (mask.dtype, mask.shape) != (layout.dtype, layout.shape):
        raise StarmergeError(
            f"{mask.file}: the mask of {tensor} is {mask.dtype} {list(mask.shape)}, and a tensor "
            f"of {unified.size} entries has one of {layout.nbytes} bytes. Fetch it again."
        )
