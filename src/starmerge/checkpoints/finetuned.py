"""Full fine-tunes: checkpoints with the names and shapes of the base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from starmerge.checkpoints.base import Base, open_base
from starmerge.checkpoints.source import Source
from starmerge.checkpoints.tensors import MERGEABLE, Checkpoint
from starmerge.deltas import Dense, wide
from starmerge.errors import StarmergeError


@dataclass(frozen=True)
class FinetunedModel:
    """A checkpoint of all of the model's weights; its deltas are dense."""

    kind = "full fine-tune"

    name: str
    source: Source
    checkpoint: Checkpoint
    tensors: frozenset[str]
    """Names of the base's tensors that it may have changed."""

    @property
    def files(self) -> list[Path]:
        """The files its deltas are read from."""
        return self.checkpoint.files

    def nbytes(self, tensor: str) -> int:
        """Return the bytes to read for a tensor's delta."""
        return self.checkpoint[tensor].nbytes

    def rank(self, tensor: str) -> int | None:
        """Return None: the delta may have any rank."""
        return None

    def delta(self, tensor: str, base: Tensor) -> Dense:
        """Return W_finetuned − W_base in float32, or in float64 if either is so.

        Args:
            tensor: Its name.
            base: The base's tensor, any floating dtype.
        """
        return difference(self.checkpoint.read(tensor), base)


def difference(tuned: Tensor, base: Tensor) -> Dense:
    """Return W_finetuned − W_base in float32, or in float64 if either is so.

    Args:
        tuned: The fine-tuned tensor; may be overwritten.
        base: The base's tensor, of the same shape.
    """
    stored, dtype = tuned.dtype, wide(torch.promote_types(tuned.dtype, base.dtype))
    if stored != base.dtype and torch.equal(tuned, base.to(stored)):
        # Nothing was changed but the dtype.
        return Dense(torch.zeros_like(tuned, dtype=dtype), stored)
    stored = _grid(tuned)
    # In place, so that one wide copy of the fine-tune is all there is.
    return Dense(tuned.to(dtype).sub_(base), stored)


def _grid(tuned: Tensor) -> torch.dtype:
    """Return the narrowest dtype that holds all values: files are often wider than the training."""
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        if torch.finfo(narrow).eps > torch.finfo(tuned.dtype).eps and torch.equal(
            tuned, tuned.to(narrow).to(tuned.dtype)
        ):
            return narrow
    return tuned.dtype


def open_finetuned(name: str, source: Source, base: Base) -> FinetunedModel:
    """Open a full fine-tune and compare its tensors with the base's, by name and shape.

    Raises:
        StarmergeError: A tensor is missing, is there in excess, or has another shape; a file is
            missing or broken.
    """
    checkpoint = open_base(source).checkpoint
    for tensor in base.checkpoint:
        if tensor not in checkpoint:
            raise StarmergeError(
                f"{source} lacks the tensor {tensor} of the base {base.source}. Is it a fine-tune "
                "of that base?"
            )
        ours, theirs = base.checkpoint[tensor].shape, checkpoint[tensor].shape
        if ours != theirs:
            raise StarmergeError(
                f"{source}: tensor {tensor} has the shape {list(theirs)}, in the base "
                f"{base.source} it is {list(ours)}. Fine-tunes of another base, or with another "
                "vocabulary, cannot be merged."
            )
        if base.checkpoint[tensor].dtype in MERGEABLE and checkpoint[tensor].dtype not in MERGEABLE:
            raise StarmergeError(
                f"{source}: tensor {tensor} is stored in {checkpoint[tensor].dtype}, which cannot "
                "be merged. Use an unquantised checkpoint."
            )
    for tensor in checkpoint:
        if tensor not in base.checkpoint:
            raise StarmergeError(
                f"{source} has the tensor {tensor}, which the base {base.source} lacks. Is it a "
                "fine-tune of that base?"
            )
    changed = frozenset(name for name in checkpoint if checkpoint[name].dtype in MERGEABLE)
    return FinetunedModel(name, source, checkpoint, changed)
