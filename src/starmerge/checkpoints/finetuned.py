"""Full fine-tunes: checkpoints with the names and shapes of the base."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge.checkpoints.base import Base, open_base
from starmerge.checkpoints.source import Source
from starmerge.checkpoints.tensors import MERGEABLE, Checkpoint, TensorInfo
from starmerge.deltas import Dense, Stored
from starmerge.errors import StarmergeError
from starmerge.storage import Place


@dataclass(frozen=True)
class FinetunedModel:
    """A checkpoint of all of the model's weights; its deltas are dense."""

    kind = "full fine-tune"

    name: str
    source: Source
    checkpoint: Checkpoint
    tensors: frozenset[str]
    """Names of the base's tensors that it may have changed."""
    notes: tuple[str, ...] = ()
    """Sentences on it that whoever merges it should read."""

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Its own."""
        return [self.checkpoint]

    @property
    def beside(self) -> list[Place]:
        """No file: the weights are all."""
        return []

    def inputs(self, tensor: str) -> list[TensorInfo]:
        """Return what is read for a tensor's delta."""
        return [self.checkpoint[tensor]]

    def rank(self, tensor: str) -> int | None:
        """Return None: the delta may have any rank."""
        return None

    def needs_base(self, tensor: str) -> bool:
        """Return True: the delta is a difference from it."""
        return True

    def module(self, tensor: str) -> None:
        """Return None: a checkpoint does not know its modules' names in PEFT."""

    def delta(self, tensor: str, base: Tensor | None) -> Dense:
        """Return W_finetuned − W_base.

        Args:
            tensor: Its name.
            base: The base's tensor, any floating dtype.
        """
        assert base is not None, "needs_base says so"
        return difference(self.checkpoint.read(tensor), base)


def difference(tuned: Tensor, base: Tensor) -> Dense:
    """Return W_finetuned − W_base, subtracted when it is looked at.

    Args:
        tuned: The fine-tuned tensor.
        base: The base's tensor, of the same shape.
    """
    if tuned.dtype != base.dtype and torch.equal(tuned, base.to(tuned.dtype)):
        # Nothing was changed but the dtype.
        return Dense(torch.zeros((), dtype=torch.float32).expand(base.shape))
    return Stored([(1.0, tuned)], base)


def open_finetuned(name: str, source: Source, base: Base) -> FinetunedModel:
    """Open a full fine-tune and compare its tensors with the base's, by name and shape.

    Raises:
        StarmergeError: A tensor is missing, is there in excess, or has another shape; a file is
            missing or broken.
    """
    opened = open_base(source)
    checkpoint = opened.checkpoint
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
    return FinetunedModel(name, source, checkpoint, changed, opened.notes)
