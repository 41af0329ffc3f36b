"""Opening a model to merge, whatever it is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from starmerge.checkpoints.base import Base
from starmerge.checkpoints.emr_task import TASK_FILE, open_emr_task
from starmerge.checkpoints.finetuned import open_finetuned
from starmerge.checkpoints.lora.adapter import open_adapter
from starmerge.checkpoints.lora.file import Module
from starmerge.checkpoints.lora.formats import is_adapter
from starmerge.checkpoints.source import Source
from starmerge.checkpoints.tensors import Checkpoint, TensorInfo
from starmerge.deltas import Delta
from starmerge.errors import UsageError
from starmerge.storage import Place, is_file


class FineTune(Protocol):
    """A model to merge: it knows which of the base's tensors it changes, and by what."""

    @property
    def kind(self) -> str:
        """What it is, for people."""

    @property
    def name(self) -> str:
        """Its name in tables and reports."""

    @property
    def source(self) -> Source:
        """Where it lies."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on it that whoever merges it should read."""

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the base's tensors that it changes."""

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The tensors that its deltas are made of."""

    @property
    def beside(self) -> list[Place]:
        """The files that its deltas depend on beside them."""

    def inputs(self, tensor: str) -> list[TensorInfo]:
        """Return what is read for a tensor's delta."""

    def rank(self, tensor: str) -> int | None:
        """Return an upper bound of the rank of a tensor's delta, None if it may be full."""

    def needs_base(self, tensor: str) -> bool:
        """Tell whether a tensor's delta is made, or checked, with the base's weight."""

    def module(self, tensor: str) -> Module | None:
        """Return a tensor's module as PEFT knows it, where the model says so."""

    def delta(self, tensor: str, base: Tensor | None) -> Delta:
        """Return a tensor's delta, given the base's tensor where it is needed."""


def files_of(model: FineTune) -> list[Place]:
    """Return the files that a model's deltas are read from."""
    return [*model.beside, *(file for own in model.checkpoints for file in own.files)]


def open_model(name: str, source: Source, base: Base, *, any_base: bool = False) -> FineTune:
    """Open an adapter, a full fine-tune or a task of an EMR merge; which, is found out by looking.

    Raises:
        UsageError: It is none of them, or of a kind that cannot be merged.
        StarmergeError: It does not fit the base, or a file is broken.
    """
    if is_adapter(source):
        return open_adapter(name, source, base, any_base=any_base)
    if is_file(source.path / TASK_FILE):
        return open_emr_task(name, source, base, any_base=any_base)
    if is_file(source.path / "config.json"):
        return open_finetuned(name, source, base)
    raise UsageError(
        f"{source} is neither an adapter (no adapter_config.json, and not the one file of an "
        f"adapter) nor a model (no config.json) nor a task of an EMR merge (no {TASK_FILE})."
    )
