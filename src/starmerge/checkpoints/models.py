"""Opening a model to merge, whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from starmerge.checkpoints.adapter import open_adapter
from starmerge.checkpoints.adapter_file import Module
from starmerge.checkpoints.base import Base
from starmerge.checkpoints.emr_task import TASK_FILE, open_emr_task
from starmerge.checkpoints.finetuned import open_finetuned
from starmerge.checkpoints.source import Source
from starmerge.checkpoints.tensors import TensorInfo
from starmerge.deltas import Delta
from starmerge.errors import UsageError


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
    def tensors(self) -> frozenset[str]:
        """Names of the base's tensors that it changes."""

    @property
    def files(self) -> list[Path]:
        """The files its deltas are read from."""

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


def open_model(name: str, source: Source, base: Base, *, any_base: bool = False) -> FineTune:
    """Open an adapter, a full fine-tune or a task of an EMR merge; which, is found out by looking.

    Raises:
        UsageError: It is none of them, or of a kind that cannot be merged.
        StarmergeError: It does not fit the base, or a file is broken.
    """
    if (source.path / "adapter_config.json").is_file():
        return open_adapter(name, source, base, any_base=any_base)
    if (source.path / TASK_FILE).is_file():
        return open_emr_task(name, source, base, any_base=any_base)
    if (source.path / "config.json").is_file():
        return open_finetuned(name, source, base)
    raise UsageError(
        f"{source} is neither an adapter (no adapter_config.json) nor a model (no config.json) nor "
        f"a task of an EMR merge (no {TASK_FILE})."
    )
