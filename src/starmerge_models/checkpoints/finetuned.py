"""Full fine-tunes: checkpoints of all or most of the base's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge_models.checkpoints.base import Base, open_base
from starmerge_models.checkpoints.configs import compare_configs
from starmerge_models.checkpoints.matching import Match, in_words, match
from starmerge_models.checkpoints.source import Source
from starmerge_models.checkpoints.tensors import (
    MERGEABLE,
    Checkpoint,
    TensorInfo,
    read_tensor,
    stored_of,
)
from starmerge_models.deltas import Dense, Stored
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.storage import Place


@dataclass(frozen=True)
class FinetunedModel:
    """A checkpoint of all or most of the model's weights; its deltas are dense."""

    kind = "full fine-tune"

    name: str
    source: Source
    checkpoint: Checkpoint
    found: Mapping[str, TensorInfo]
    """The fine-tune's tensors, by the base's names."""
    notes: tuple[str, ...] = ()
    """Notes for the user."""
    base_name: str | None = None
    """None: a checkpoint does not record its base."""
    untied: str | None = None
    """The base's name of the output layer, if the base ties it to the embedding and the fine-tune
    does not."""
    settings: tuple[Place, ...] = ()
    """The config of quantised weights, on which their values depend; empty for plain ones."""

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the base's tensors that the fine-tune may have changed."""
        return frozenset(self.found)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The fine-tune's checkpoint."""
        return [self.checkpoint]

    @property
    def other_files(self) -> list[Place]:
        """The config of quantised weights."""
        return list(self.settings)

    def inputs(self, tensor: str) -> list[TensorInfo]:
        """Return the tensors that are read for a tensor's delta."""
        return [self.found[tensor]]

    def rank(self, tensor: str) -> int | None:
        """Return None: the delta may have any rank."""
        return None

    def needs_base(self, tensor: str) -> bool:
        """Return True: the delta is a difference from the base."""
        return True

    def module(self, tensor: str) -> None:
        """Return None: the modules' names in PEFT are unknown."""

    def delta(self, tensor: str, base: Tensor | None) -> Dense:
        """Return W_finetuned − W_base.

        Args:
            tensor: Name of the tensor.
            base: The base's tensor, any floating dtype.
        """
        assert base is not None, "needs_base says so"
        return difference(read_tensor(self.found[tensor]), base)


def difference(tuned: Tensor, base: Tensor) -> Dense:
    """Return the lazy difference W_finetuned − W_base.

    Args:
        tuned: The fine-tuned tensor.
        base: The base's tensor, of the same shape.
    """
    if tuned.dtype != base.dtype and torch.equal(tuned, base.to(tuned.dtype)):
        # Only the dtype differs.
        return Dense(torch.zeros((), dtype=torch.float32).expand(base.shape))
    return Stored([(1.0, tuned)], base)


def open_finetuned(
    name: str, source: Source, base: Base, *, any_base: bool = False, common: bool = False
) -> FinetunedModel:
    """Open a full fine-tune: compare its config with the base's, and match the tensors of both.

    Args:
        name: The model's name in tables and reports.
        source: The fine-tune's folder.
        base: The base of the merge.
        any_base: Accept a config that changes the function of the weights.
        common: Leave out tensors of only one side or with different shapes, such as heads.

    Raises:
        UsageError: The config is that of another model.
        StarmergeError: A tensor is missing, unknown, or has another shape; a file is missing or
            broken.
    """
    own = open_base(source)
    compared = compare_configs(base.config, own.config)
    if compared.function and not any_base:
        raise UsageError(
            f"{source}: by its config.json it is another model than the base {base.source}, and "
            f"their average would be neither: {'; '.join(compared.function)}. If this changes "
            "nothing, say so with --any-base."
        )
    notes = list(own.notes)
    if differences := [*compared.function, *compared.noted]:
        notes.append(
            f"{name}: config.json differs in {'; '.join(differences)}. The merge has the base's."
        )
    matched = match(source, own, base)
    fitting = {
        tensor: info for tensor, info in matched.found.items() if base.fits(tensor, info.shape)
    }
    misshapen = tuple(tensor for tensor in matched.found if tensor not in fitting)
    _check_complete(source, base, matched, fitting, misshapen)
    is_part = compared.is_part and not (matched.excess or misshapen)
    if not (common or is_part):
        _check_same(source, base, matched, misshapen)
    left = (*matched.lacking, *misshapen)
    if left:
        words = in_words(left, fitting)
        notes.append(f"{name} has nothing to merge with {words} of the base, which stays so.")
    if matched.excess:
        words = in_words(matched.excess, _names(fitting))
        notes.append(f"Left out of {name}, as the base lacks it: {words}.")
    changed = {}
    for tensor in base.checkpoint:
        if tensor in fitting and base.checkpoint[tensor].dtype in MERGEABLE:
            changed[tensor] = fitting[tensor]
            if fitting[tensor].dtype not in MERGEABLE:
                raise StarmergeError(
                    f"{source}: tensor {fitting[tensor].name} is stored in "
                    f"{fitting[tensor].dtype}, which cannot be merged. Use an unquantised "
                    "checkpoint."
                )
    return FinetunedModel(
        name,
        source,
        own.checkpoint,
        changed,
        notes=tuple(notes),
        untied=matched.untied,
        settings=own.settings,
    )


def _check_complete(
    source: Source,
    base: Base,
    matched: Match,
    fitting: Mapping[str, TensorInfo],
    misshapen: tuple[str, ...],
) -> None:
    """Refuse fine-tunes that cannot be merged even with ``common``."""
    for tensor in misshapen:
        if not matched.found[tensor].size and base.checkpoint[tensor].size:
            raise StarmergeError(
                f"{source}: tensor {matched.found[tensor].name} is empty, in the base "
                f"{base.source} it is {list(base.checkpoint[tensor].shape)}. Models trained under "
                "DeepSpeed ZeRO-3 are saved so when the parts are not gathered: make the weights "
                "with zero_to_fp32.py of the training checkpoint, or save again with "
                "stage3_gather_16bit_weights_on_model_save."
            )
    if not fitting:
        raise StarmergeError(
            f"{source} has no tensor of the base {base.source}, under any prefix of its names and "
            f"of the same shape; it has {in_words(matched.excess or misshapen, ())}. Is it a "
            "fine-tune of that base?"
        )


def _check_same(source: Source, base: Base, matched: Match, misshapen: tuple[str, ...]) -> None:
    """Refuse fine-tunes that can only be merged with ``common``."""
    remedy = (
        "To merge the part that both have, and leave the base's heads and towers as they are, say "
        "--common (common: true in a recipe)."
    )
    if matched.lacking or matched.excess:
        sides = []
        if matched.lacking:
            words = in_words(matched.lacking, matched.found)
            sides.append(f"lacks {words} of the base {base.source}")
        if matched.excess:
            words = in_words(matched.excess, _names(matched.found))
            sides.append(f"has {words}, which the base {base.source} lacks")
        raise StarmergeError(
            f"{source} {' and '.join(sides)}: another head, or a part of the model. {remedy} If it "
            "is no fine-tune of that base, give its own."
        )
    for tensor in misshapen:
        ours, theirs = base.checkpoint[tensor].shape, matched.found[tensor].shape
        raise StarmergeError(
            f"{source}: tensor {matched.found[tensor].name} has the shape {list(theirs)}, in the "
            f"base {base.source} it is {list(ours)}. Fine-tunes of another base cannot be merged. "
            f"{remedy}"
        )


def _names(found: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names of a fine-tune's tensors in its files."""
    return [stored.name for stored in stored_of(found.values())]
