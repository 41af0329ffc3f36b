"""Adapters: models that consist of changes of some weights, as factors or dense."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from starmerge_models.checkpoints.finetuned import difference
from starmerge_models.checkpoints.lora.config import AdapterConfig
from starmerge_models.checkpoints.lora.dora import dora_delta
from starmerge_models.checkpoints.lora.file import Module
from starmerge_models.checkpoints.lora.formats import Format
from starmerge_models.checkpoints.lora.update import Blocks, ExpertProduct, Update
from starmerge_models.checkpoints.source import Source
from starmerge_models.checkpoints.tensors import Checkpoint, TensorInfo
from starmerge_models.deltas import Delta, Dense, LowRank
from starmerge_models.storage import Place


@dataclass(frozen=True)
class PlacedUpdate:
    """An update with the layout of the base's weight that it changes."""

    update: Update
    shape: tuple[int, ...]
    """Shape of the base's tensor."""
    transposed: bool
    """Whether the base stores the weight as (in, out), so that the delta is the transpose."""


@dataclass(frozen=True)
class Adapter:
    """An adapter; its deltas are factors if possible.

    The deltas of DoRA and of whole modules are dense, and those of LoHa and LoKr whose factors
    would be as large as the matrix.
    """

    name: str
    source: Source
    format: Format
    checkpoint: Checkpoint
    updates: dict[str, PlacedUpdate]
    """Updates by the base's names of the tensors."""
    replacements: dict[str, str]
    """Keys of the tensors that replace the base's, by the base's names."""
    config: AdapterConfig
    other_files: list[Place]
    """Other files on which the deltas depend, such as the config with the scale."""
    copies: dict[str, str] = field(default_factory=dict)
    """Keys of copies of the base's tables that have another number of rows, by the base's names."""
    carried: dict[str, str] = field(default_factory=dict)
    """Keys of tensors of whole modules, by name, if the base's weights are unknown."""
    notes: tuple[str, ...] = ()
    """Notes for the user."""
    untied: str | None = None
    """The base's name of the output layer, if the base ties it and the model does not."""

    @property
    def base_name(self) -> str | None:
        """Hub id of the base on which the adapter was trained, from its config."""
        return self.config.base_hub_id

    @property
    def kind(self) -> str:
        """Description of the kind of model."""
        return self.format.title

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the base's tensors that the adapter changes."""
        return frozenset((*self.updates, *self.replacements))

    @property
    def saved(self) -> frozenset[str]:
        """Names of the tensors that the adapter replaces, from ``modules_to_save``."""
        return frozenset((*self.replacements, *self.carried))

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoint of the factors."""
        return [self.checkpoint]

    def inputs(self, tensor: str) -> list[TensorInfo]:
        """Return the tensors that are read for a tensor's delta."""
        if tensor in self.replacements:
            return [self.checkpoint[self.replacements[tensor]]]
        return [self.checkpoint[key] for key in self.updates[tensor].update.keys]

    def needs_base(self, tensor: str) -> bool:
        """Return whether a tensor's delta is computed or checked with the base's weight."""
        if tensor in self.replacements:
            return True
        return bool(self.updates[tensor].update.magnitude)

    def module(self, tensor: str) -> Module | None:
        """Return the module of a tensor as named by the adapter's tool.

        None if the tensor is replaced whole, is a vector, or is one of several experts with common
        factors.
        """
        if tensor in self.replacements or len(self.updates[tensor].shape) < 2:
            return None
        placed = self.updates[tensor]
        if isinstance(placed.update.change, ExpertProduct | Blocks):
            return None
        is_embedding = placed.update.is_embedding
        return Module(placed.update.module, is_embedding, placed.transposed and not is_embedding)

    def rank(self, tensor: str) -> int | None:
        """Return the rank r of a tensor's factors; None if the delta is dense."""
        return None if tensor in self.replacements else self.updates[tensor].update.rank

    def delta(self, tensor: str, base: Tensor | None) -> Delta:
        """Return the delta of a tensor, as factors if possible, including the scale.

        For a convolution it is the matrix (out, in·k), for an embedding and for layers stored as
        (in, out) it is (B·A)ᵀ. The deltas of DoRA and of whole modules are dense.

        Args:
            tensor: Name of the tensor.
            base: The base's tensor, any floating dtype; None if it is not needed.
        """
        if tensor in self.replacements:
            assert base is not None, "needs_base says so"
            return difference(self.checkpoint.read(self.replacements[tensor]), base)
        placed = self.updates[tensor]
        update = placed.update
        delta = update.change.delta(self.checkpoint.read)
        if update.magnitude is not None:
            assert base is not None, "needs_base says so"
            return dora_delta(
                base,
                delta,
                self.checkpoint.read(update.magnitude.key),
                transposed=placed.transposed,
                axis=update.magnitude.axis,
                epsilon=update.magnitude.epsilon,
            )
        if isinstance(delta, Dense):
            matrix = delta.matrix.T if placed.transposed else delta.matrix
            return Dense(matrix.reshape(placed.shape))
        return LowRank(delta.A.T, delta.B.T, delta.scale) if placed.transposed else delta
