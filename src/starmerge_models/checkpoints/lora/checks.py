"""Checks of an adapter's tensors against the base's: shapes, dtypes, copies, names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.lora.config import AdapterConfig
from starmerge_models.checkpoints.lora.formats import AdapterContents
from starmerge_models.checkpoints.lora.formats.peft_keys import unconsumed
from starmerge_models.checkpoints.lora.update import Update
from starmerge_models.checkpoints.source import Source
from starmerge_models.checkpoints.tensors import MERGEABLE, Checkpoint, TensorInfo
from starmerge_models.deltas import matrix_shape
from starmerge_models.errors import StarmergeError, UsageError


def check_copies(
    source: Source, base: Base, contents: AdapterContents, found: Mapping[str, str]
) -> dict[str, str]:
    """Check that declared and apparent copies of the base's weights are equal to them.

    Returns:
        Keys of copies with another number of rows, by the base's names of the tables.
    """
    grown: dict[str, str] = {}
    for name, key in contents.copies.items():
        tensor = found.get(name)
        copy = contents.checkpoint[key]
        if tensor is None and base.embedding is not None:
            # The output layer, which the base's files do not contain if it is tied.
            tied = copy.shape == base.checkpoint[base.embedding].shape and bool(base.tied)
            tensor = base.embedding if tied else None
        is_same = tensor is not None and _is_copy(contents.checkpoint.read(key), base, tensor)
        if is_same and tensor is not None and copy.shape != base.checkpoint[tensor].shape:
            grown[tensor] = key
        if name in contents.undeclared and not is_same:
            others = [other for other in contents.saved.values() if other != key]
            if not any(_are_same(contents.checkpoint, key, other) for other in others):
                raise StarmergeError(unconsumed(source, key))
        elif tensor is not None and not is_same:
            ours = base.checkpoint[tensor].shape
            if copy.shape != ours:
                raise StarmergeError(
                    f"{source}: {key} has the shape {list(copy.shape)}, in the base {base.source} "
                    f"it is {list(ours)}. The adapter was trained on another base, or with another "
                    "vocabulary."
                )
            raise StarmergeError(
                f"{source}: {key} is not the base's weight. The adapter was trained on another "
                "base, or together with that weight; then fold it with PEFT's merge_and_unload and "
                "give the full model."
            )
    return grown


def _is_copy(copy: Tensor, base: Base, tensor: str) -> bool:
    """Return whether a tensor equals the base's, up to rounding to the dtype of the training.

    For token tables only the rows of both are compared.
    """
    weight = base.checkpoint.read(tensor)
    if copy.ndim != weight.ndim or not base.fits(tensor, tuple(copy.shape)):
        return False
    rows = min(len(copy), len(weight))
    roundings = (copy.dtype, torch.bfloat16, torch.float16)
    return any(
        torch.equal(copy[:rows], weight[:rows].to(dtype).to(copy.dtype)) for dtype in roundings
    )


def _are_same(checkpoint: Checkpoint, first: str, second: str) -> bool:
    shapes = {checkpoint[key].shape for key in (first, second)}
    return len(shapes) == 1 and torch.equal(checkpoint.read(first), checkpoint.read(second))


def check_all_found(
    source: Source,
    base: Base,
    contents: AdapterContents,
    found: Mapping[str, str],
    experts: Mapping[str, Update],
    head: str | None,
) -> None:
    """Check that the base has every tensor that an adapter changes.

    Args:
        source: The adapter.
        base: The base.
        contents: The content of the adapter.
        found: The base's names for the adapter's.
        experts: The updates of experts, by the base's names.
        head: The adapter's name of an output layer that the base's files do not contain.

    Raises:
        StarmergeError: The base lacks a tensor.
    """
    joined = {key for update in experts.values() for key in update.change.keys}
    lacks = f"but the base {base.source} has no tensor"
    for module in contents.updates:
        if module.weight in found or module.weight == head or joined.issuperset(module.keys):
            continue
        if contents.format.is_diffusion:
            raise StarmergeError(
                f"{source} changes {module.module}, {lacks} of that name. The base is one part of "
                "a pipeline: an adapter that changes others, too, such as text encoders, is merged "
                "with adapters alone (--as adapter). If it has the names of the model's maker, "
                "load it with diffusers (load_lora_weights), and save it (save_lora_weights)."
            )
        raise StarmergeError(
            f"{source} adapts {module.module}, {lacks} {module.weight}. The adapter was trained on "
            "another model, or on a weight that this one ties to another. If transformers renames "
            "the base's tensors when it loads them, install transformers 5 or later, which knows "
            "the names, or fold the adapter with PEFT's merge_and_unload and give the full model."
        )


def lacks_modules(
    source: Source, base: Base, contents: AdapterContents, lacking: Sequence[str]
) -> str:
    """Return the error message for an adapter that replaces modules that the base lacks."""
    return (
        f"{source} holds {contents.saved[lacking[0]]}, of modules_to_save in adapter_config.json, "
        f"but the base {base.source} has no tensor {lacking[0]}. Give a base that has the module, "
        "such as the model the training began with, saved with its new head; or merge the part "
        "that both have, and leave the adapter's own modules out, with --common (common: true in a "
        "recipe)."
    )


def check_dtypes(base: Base, tensor: str, checkpoint: Checkpoint, update: Update) -> None:
    """Check that an update and the base's tensor have floating-point dtypes of at least 16 bits.

    Raises:
        StarmergeError: One of them has another dtype.
    """
    parts = [checkpoint[key] for key in update.keys]
    for info in (*parts, base.checkpoint[tensor]):
        if info.dtype not in MERGEABLE:
            raise StarmergeError(
                f"{info.file}: tensor {info.name} is stored in {info.dtype}, which cannot be "
                "merged. Use an unquantised checkpoint."
            )


def check_shapes(
    source: Source, base: Base, tensor: str, checkpoint: Checkpoint, update: Update
) -> None:
    """Check that an update and its magnitudes fit the base's tensor or its transpose.

    Raises:
        StarmergeError: They do not fit.
    """
    shape, target = update.change.shape, base.checkpoint[tensor].shape
    shape = shape[::-1] if update.is_embedding else shape
    may_turn = len(shape) == 2 and not update.is_embedding
    is_own = fits_weight(shape, target) or (may_turn and shape[::-1] == target)
    if not is_own and not base.fits(tensor, shape):
        raise StarmergeError(
            f"{source}: the update of {tensor} has the shape {list(shape)}, in the base "
            f"{base.source} it is {list(target)}. The adapter was trained on another model."
        )
    if update.magnitude:
        size, axis = checkpoint[update.magnitude.key].size, update.magnitude.axis
        wanted = update.change.shape[0] if axis == 0 else _inputs(update, target)
        if size != wanted:
            raise StarmergeError(
                f"{source}: {update.magnitude.key} has {size} entries, and {tensor} has {wanted} "
                f"{'inputs' if axis else 'outputs'}."
            )


def fits_weight(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Return whether the shape of a change fits that of a weight.

    Tools may flatten the changes of kernels, or leave out the last axes of 1 × 1 kernels.
    """
    if len(shape) == len(target) or len(shape) != 2:
        return shape == target
    return shape == matrix_shape(target)


def _inputs(update: Update, target: tuple[int, ...]) -> int:
    """Return the number of inputs of a weight, given its shape in the base."""
    return update.change.shape[1] if len(target) == 2 else target[1]


def is_transposed(
    source: Source, config: AdapterConfig, base: Base, tensor: str, update: Update
) -> bool:
    """Return whether the base stores a weight as (in, out), given shapes that fit.

    Tables of embeddings are always stored so. For linear layers the shape decides. For square
    weights the config's ``fan_in_fan_out`` decides. PEFT has one value of it for all layers of an
    adapter, so it must agree with the other layers of the base.
    """
    if update.is_embedding:
        return True
    shape, target = update.change.shape, base.checkpoint[tensor].shape
    if len(target) != 2 or shape[0] != shape[1]:
        return not (fits_weight(shape, target) or base.fits(tensor, shape))
    if config.fan_in_fan_out != base.stores_input_first:
        raise UsageError(
            f"{source}: fan_in_fan_out is {config.fan_in_fan_out}, but layers of the base "
            f"{base.source} say otherwise, and the square {tensor} does not tell. Fold the adapter "
            "with PEFT's merge_and_unload and give the full model."
        )
    return config.fan_in_fan_out


def is_replacement(source: Source, base: Base, tensor: str, saved: TensorInfo) -> bool:
    """Check a tensor of a whole module; return whether it is a weight, not a step counter."""
    stored = base.checkpoint[tensor]
    if not base.fits(tensor, saved.shape):
        raise StarmergeError(
            f"{source}: {saved.name}, of modules_to_save in adapter_config.json, has the shape "
            f"{list(saved.shape)}, in the base {base.source} it is {list(stored.shape)}. The "
            "module was resized, or the adapter was trained on another model."
        )
    if (saved.dtype in MERGEABLE) != (stored.dtype in MERGEABLE):
        raise StarmergeError(
            f"{source}: {saved.name} is stored in {saved.dtype}, in the base {base.source} in "
            f"{stored.dtype}; they cannot be subtracted. Use unquantised checkpoints."
        )
    return saved.dtype in MERGEABLE
