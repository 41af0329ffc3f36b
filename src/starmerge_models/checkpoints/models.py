"""Opening of models to merge: adapters, full fine-tunes and tasks of EMR merges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.emr_task import TASK_FILE, open_emr_task
from starmerge_models.checkpoints.finetuned import open_finetuned
from starmerge_models.checkpoints.lora.file import Module
from starmerge_models.checkpoints.lora.formats import is_adapter
from starmerge_models.checkpoints.lora.opening import open_adapter
from starmerge_models.checkpoints.names import naming_of
from starmerge_models.checkpoints.source import Source
from starmerge_models.checkpoints.tensors import Checkpoint, TensorInfo
from starmerge_models.deltas import Delta
from starmerge_models.errors import UsageError
from starmerge_models.storage import Place, is_file


class FineTune(Protocol):
    """A model to merge, with the deltas of the base's tensors that it changes."""

    @property
    def kind(self) -> str:
        """Description of the kind of model."""

    @property
    def name(self) -> str:
        """The model's name in tables and reports."""

    @property
    def source(self) -> Source:
        """Source of the model's files."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user."""

    @property
    def base_name(self) -> str | None:
        """Hub id of the base, if the model names it."""

    @property
    def untied(self) -> str | None:
        """The base's name of the output layer, if the base ties it and the model does not."""

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the base's tensors that the model changes."""

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints from which the deltas are computed."""

    @property
    def other_files(self) -> list[Place]:
        """Other files on which the deltas depend."""

    def inputs(self, tensor: str) -> list[TensorInfo]:
        """Return the tensors that are read for a tensor's delta."""

    def rank(self, tensor: str) -> int | None:
        """Return an upper bound of the rank of a tensor's delta, None if it may be full."""

    def needs_base(self, tensor: str) -> bool:
        """Return whether a tensor's delta is computed or checked with the base's weight."""

    def module(self, tensor: str) -> Module | None:
        """Return a tensor's module as named in PEFT, if the model contains it."""

    def delta(self, tensor: str, base: Tensor | None) -> Delta:
        """Return a tensor's delta, given the base's tensor if it is needed."""


def files_of(model: FineTune) -> list[Place]:
    """Return the files that a model's deltas are read from."""
    return [*model.other_files, *(file for own in model.checkpoints for file in own.opened.files)]


def open_models(
    opened: Callable[[Base], tuple[FineTune, ...]], base: Base, *, any_base: bool = False
) -> tuple[Base, tuple[FineTune, ...]]:
    """Open the models of a merge.

    Args:
        opened: Function that opens the models for a base.
        base: The base of the merge.
        any_base: Accept models that name different bases.

    Returns:
        The base, untied if a model changes only one of the tied weights; the models.

    Raises:
        UsageError: A model has another base, or is of a kind that cannot be merged.
        StarmergeError: A model does not fit the base, or a file is broken.
    """
    found = opened(base)
    base = _named(base, found, any_base=any_base)
    heads = [model.untied for model in found if model.untied is not None]
    if not heads:
        return base, found
    untied = base.untied(heads[0], naming_of(base).ties)
    return untied, opened(untied)


def _named(base: Base, models: Sequence[FineTune], *, any_base: bool) -> Base:
    """Return the base with the Hub id that the models name, if the base has none.

    Raises:
        UsageError: The models name different bases.
    """
    named: dict[str, FineTune] = {}
    for model in models:
        if model.base_name is not None:
            named.setdefault(model.base_name.lower(), model)
    if base.source.name is not None or not named:
        return base
    first, *others = named.values()
    if others and not any_base:
        raise UsageError(
            f"{first.source} was made from the base {first.base_name}, and {others[0].source} from "
            f"{others[0].base_name}. If both are the same weights, say so with --any-base."
        )
    return base if others else replace(base, source=replace(base.source, name=first.base_name))


def open_model(
    name: str, source: Source, base: Base, *, any_base: bool = False, common: bool = False
) -> FineTune:
    """Open an adapter, a full fine-tune or a task of an EMR merge, and detect which it is.

    Args:
        name: The model's name in tables and reports.
        source: Source of the model.
        base: The base of the merge.
        any_base: Accept a model that names another base, or whose config differs.
        common: Merge only the tensors that the model and the base have in common.

    Raises:
        UsageError: The source is none of these, or of a kind that cannot be merged.
        StarmergeError: The model does not fit the base, or a file is broken.
    """
    if is_adapter(source):
        return open_adapter(name, source, base, any_base=any_base, common=common)
    if is_file(source.path / TASK_FILE):
        return open_emr_task(name, source, base, any_base=any_base)
    if is_file(source.path / "config.json"):
        return open_finetuned(name, source, base, any_base=any_base, common=common)
    raise UsageError(
        f"{source} is neither an adapter (no adapter_config.json, and not the one file of an "
        f"adapter) nor a model (no config.json) nor a task of an EMR merge (no {TASK_FILE})."
    )
