"""A model with adapters folded into it, which is merged like one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.lora.file import Module
from starmerge_models.checkpoints.models import FineTune, open_model
from starmerge_models.checkpoints.source import Source, resolve
from starmerge_models.checkpoints.tensors import Checkpoint, TensorInfo
from starmerge_models.deltas import Delta, compute_dtype, total
from starmerge_models.errors import UsageError
from starmerge_models.storage import Place, real


@dataclass(frozen=True)
class Composite:
    """Base class of models to merge that consist of several models."""

    name: str
    source: Source
    parts: tuple[FineTune, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(dict.fromkeys(note for part in self.parts for note in part.notes))

    @property
    def untied(self) -> str | None:
        """The untied output layer of the first part that has one."""
        return next((part.untied for part in self.parts if part.untied is not None), None)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those of all parts."""
        return [own for part in self.parts for own in part.checkpoints]

    @property
    def other_files(self) -> list[Place]:
        """Those of all parts."""
        return [file for part in self.parts for file in part.other_files]


@dataclass(frozen=True)
class FoldedModel(Composite):
    """A model and the adapters that were trained on top of it; the delta is the sum of all.

    The delta of a full fine-tune W with an adapter is (W − W_base) + s · B A, without rounding to
    the dtype of W in between. The parts are the model and its adapters, in the order of folding.
    """

    @property
    def kind(self) -> str:
        """Description of the kind of model."""
        return " + ".join(part.kind for part in self.parts)

    @property
    def base_name(self) -> str | None:
        """The base's name of the first part; other parts may name the model below them."""
        return self.parts[0].base_name

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the base's tensors that some part changes."""
        return frozenset().union(*(part.tensors for part in self.parts))

    def inputs(self, tensor: str) -> list[TensorInfo]:
        """Return the tensors that are read for a tensor's delta."""
        return [info for part in self._changing(tensor) for info in part.inputs(tensor)]

    def rank(self, tensor: str) -> int | None:
        """Return the sum of the parts' ranks; None if the rank of a part may be full."""
        ranks = [part.rank(tensor) for part in self._changing(tensor)]
        known = [rank for rank in ranks if rank is not None]
        return sum(known) if len(known) == len(ranks) else None

    def needs_base(self, tensor: str) -> bool:
        """Return whether a part needs the base's weight."""
        return any(part.needs_base(tensor) for part in self._changing(tensor))

    def module(self, tensor: str) -> Module | None:
        """Return a tensor's module as named in an adapter of the parts."""
        modules = (part.module(tensor) for part in self._changing(tensor))
        return next((module for module in modules if module is not None), None)

    def delta(self, tensor: str, base: Tensor | None) -> Delta:
        """Return the sum of the parts' deltas, each relative to the model below it.

        Args:
            tensor: Name of the tensor.
            base: The base's tensor, if it is needed.
        """
        deltas = list[Delta]()
        for part in self._changing(tensor):
            below = base
            if deltas and base is not None and part.needs_base(tensor):
                # DoRA and whole modules depend on the weight of the model below.
                added = total(deltas).to_dense().reshape(base.shape)
                below = base.to(compute_dtype(base.dtype)) + added
            deltas.append(part.delta(tensor, below))
        return total(deltas)

    def _changing(self, tensor: str) -> list[FineTune]:
        return [part for part in self.parts if tensor in part.tensors]


def open_folded(
    name: str,
    references: Sequence[str],
    base: Base,
    *,
    any_base: bool = False,
    common: bool = False,
    alone: bool = True,
) -> FineTune:
    """Open a model with the adapters to fold into it.

    Args:
        name: The model's name in tables and reports.
        references: Folders or Hub ids: the model, then the adapters.
        base: The base.
        any_base: As for :func:`open_model`.
        common: As for :func:`open_model`.
        alone: Whether adapters on the base itself may be opened without the base. False if they are
            merged into other layers than those on which they were trained.

    Raises:
        UsageError: A reference after the first is not an adapter.
        StarmergeError: As for :func:`open_model`.
    """
    sources = [resolve(reference, may_be_file=True) for reference in references]
    if alone and len(sources) > 1 and real(sources[0].path) == real(base.source.path):
        del sources[0]
    first, *others = sources
    parts = [open_model(name, first, base, any_base=any_base, common=common)]
    # An adapter on a fine-tune may name the fine-tune as its base.
    parts += [open_model(name, source, base, any_base=True) for source in others]
    for part in parts[1:]:
        if part.kind == "full fine-tune":
            raise UsageError(
                f"{part.source} is a full model, and stands where an adapter is wanted: what "
                "follows a '+' is folded into the model before it. List it as a model of its own."
            )
    if len(parts) == 1:
        return parts[0]
    source = Source("+".join(references), sources[0].path, None, None)
    return FoldedModel(name, source, tuple(parts))
