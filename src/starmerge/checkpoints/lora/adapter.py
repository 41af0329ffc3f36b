"""Adapters: the updates that a file holds, matched to the base.

The tensors of a file are read in :mod:`~starmerge.checkpoints.lora.formats`, whichever tool wrote
them, and which of the base's they mean in :mod:`~starmerge.checkpoints.names` and
:mod:`~starmerge.checkpoints.lora.flat_names`; here the shapes are checked against the base, and the
deltas are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from starmerge.checkpoints.base import Base
from starmerge.checkpoints.finetuned import difference
from starmerge.checkpoints.lora.config import AdapterConfig
from starmerge.checkpoints.lora.dora import dora_delta
from starmerge.checkpoints.lora.experts import joined_updates, single_updates
from starmerge.checkpoints.lora.file import Module
from starmerge.checkpoints.lora.flat_names import match_flat, match_parts
from starmerge.checkpoints.lora.formats import AdapterContents, Format, read_adapter
from starmerge.checkpoints.lora.keys import unconsumed
from starmerge.checkpoints.lora.ties import are_equal, ends_of, head_not_stored, name_of_head
from starmerge.checkpoints.lora.update import Blocks, ExpertProduct, Update
from starmerge.checkpoints.names import completed, match_names, match_stored
from starmerge.checkpoints.source import Source
from starmerge.checkpoints.tensors import MERGEABLE, Checkpoint, TensorInfo
from starmerge.deltas import Delta, Dense, LowRank, matrix_shape
from starmerge.errors import StarmergeError, UsageError
from starmerge.storage import Place


@dataclass(frozen=True)
class PlacedUpdate:
    """An update, and how the base holds the weight that it changes."""

    update: Update
    shape: tuple[int, ...]
    """Of the base's tensor."""
    transposed: bool
    """Whether the base holds the weight as (in, out), so that its change is the transpose."""


@dataclass(frozen=True)
class Adapter:
    """An adapter; its deltas stay in factors where it has them.

    Dense are DoRA's, those of whole modules, and those of LoHa and LoKr whose factors would be as
    large as the matrix.
    """

    name: str
    source: Source
    format: Format
    checkpoint: Checkpoint
    updates: dict[str, PlacedUpdate]
    """By the base's names of the tensors."""
    replacements: dict[str, str]
    """Keys of the tensors that stand for the base's, by the base's names."""
    config: AdapterConfig
    beside: list[Place]
    """The files that its deltas depend on beside the weights, such as the config with the scale."""
    copies: dict[str, str] = field(default_factory=dict)
    """Keys of copies of the base's tables that have another number of rows, by the base's names."""
    carried: dict[str, str] = field(default_factory=dict)
    """Keys of tensors of whole modules, by their names, where nothing is known of the base's."""
    notes: tuple[str, ...] = ()
    """Sentences on it that whoever merges it should read."""
    untied: str | None = None
    """The base's name of the output layer, where the base ties it and the model does not."""

    @property
    def base_name(self) -> str | None:
        """Hub id of the base that it was trained on, as its config has it."""
        return self.config.base_hub_id

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return self.format.title

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the base's tensors that it changes."""
        return frozenset((*self.updates, *self.replacements))

    @property
    def saved(self) -> frozenset[str]:
        """Names of the tensors that it replaces, being those of ``modules_to_save``."""
        return frozenset((*self.replacements, *self.carried))

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Its factors."""
        return [self.checkpoint]

    def inputs(self, tensor: str) -> list[TensorInfo]:
        """Return what is read for a tensor's delta."""
        if tensor in self.replacements:
            return [self.checkpoint[self.replacements[tensor]]]
        return [self.checkpoint[key] for key in self.updates[tensor].update.keys]

    def needs_base(self, tensor: str) -> bool:
        """Tell whether a tensor's delta is made, or checked, with the base's weight."""
        if tensor in self.replacements:
            return True
        return bool(self.updates[tensor].update.magnitude)

    def module(self, tensor: str) -> Module | None:
        """Return the module of a tensor as its tool knows it.

        None where the tensor is replaced whole, is a vector, which has no factors, or one of
        several experts that have theirs together.
        """
        if tensor in self.replacements or len(self.updates[tensor].shape) < 2:
            return None
        placed = self.updates[tensor]
        if isinstance(placed.update.change, ExpertProduct | Blocks):
            return None
        is_embedding = placed.update.is_embedding
        return Module(placed.update.module, is_embedding, placed.transposed and not is_embedding)

    def rank(self, tensor: str) -> int | None:
        """Return the rank r of a tensor's factors, None where the delta is dense."""
        return None if tensor in self.replacements else self.updates[tensor].update.rank

    def delta(self, tensor: str, base: Tensor | None) -> Delta:
        """Return the change of a tensor: in factors where it has them, scale included.

        For a convolution that is the matrix (out, in·k), for an embedding and for layers stored
        input-first it is (B·A)ᵀ. DoRA's change and that of a whole module are dense.

        Args:
            tensor: Its name.
            base: The base's tensor, any floating dtype; None where it is not needed.
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


def open_adapter(name: str, source: Source, base: Base, *, any_base: bool = False) -> Adapter:
    """Open an adapter: read its config and header, and match every tensor to the base.

    Copies of the base's weights that it comes with are compared with them.

    Args:
        name: The model's name in tables and reports.
        source: The adapter's folder, or its file.
        base: The base it is to be merged into.
        any_base: Accept an adapter whose config names another base.

    Raises:
        UsageError: The adapter names another base, or is of a kind that is not merged.
        StarmergeError: A tensor is missing, unknown or of the wrong shape; a file is broken.
    """
    contents = read_adapter(source, base.config)
    if not any_base:
        contents.config.check_base_name(base)
    if not base.has_weights:
        return _open_alone(name, source, base, contents)
    found: dict[str, str] = {}
    names = [*contents.names, *contents.copies]
    if not contents.format.has_flat_names:
        found = match_names(source, base, names)
    if contents.format.is_diffusion and len(found) < len(contents.names):
        found = match_flat(source, contents.names, base.checkpoint, base.config)
    grown = _check_copies(source, base, contents, found)
    head = None if contents.config.is_headless else head_not_stored(base, contents, found)
    left = [update for update in contents.updates if update.weight not in found]
    experts = joined_updates(source, base, contents)
    experts |= single_updates(source, base, contents, left)
    _check_all_found(source, base, contents, found, experts, head)
    placed = {
        found[update.weight]: _place(source, base, found[update.weight], contents, update)
        for update in contents.updates
        if update.weight in found
    }
    placed |= {
        tensor: PlacedUpdate(update, base.checkpoint[tensor].shape, transposed=False)
        for tensor, update in experts.items()
    }
    replacements = {
        found[saved]: key
        for saved, key in contents.saved.items()
        if saved in found and _is_replacement(source, base, found[saved], contents.checkpoint[key])
    }
    adapter = replace(_adapter(name, source, contents, placed, replacements), copies=grown)
    return adapter if contents.config.is_headless else _tied(adapter, base, contents, found, head)


def _tied(
    adapter: Adapter,
    base: Base,
    contents: AdapterContents,
    found: Mapping[str, str],
    head: str | None,
) -> Adapter:
    """Return an adapter whose changes of tied ends are one; or with the end that it unties.

    Args:
        adapter: The adapter, without its change of an output layer that is not stored.
        base: The base.
        contents: What the adapter holds.
        found: The base's names for the adapter's.
        head: Its name of an output layer that is changed and not stored.
    """
    ends = ends_of(base)
    changed = [end for end in ends if end in adapter.tensors]
    if base.embedding is None or not (changed or head):
        return adapter

    def change_of(end: str) -> Update | str:
        return adapter.replacements.get(end) or adapter.updates[end].update

    read = adapter.checkpoint.read
    first = change_of(changed[0]) if changed else None
    if head is not None:
        by_weight = {update.weight: update for update in contents.updates}
        own = contents.saved.get(head) or by_weight[head]
        if first is None and contents.config.ties:
            return _with_ends(adapter, base, [base.embedding], own)
        if first is not None and are_equal(first, own, read):
            return adapter
        return replace(adapter, untied=name_of_head(base, head, found))
    assert first is not None, "some end is changed"
    is_one = all(are_equal(first, change_of(end), read) for end in changed[1:])
    if is_one and (contents.config.ties or (len(changed) == len(ends) > 1)):
        return _with_ends(adapter, base, [end for end in ends if end not in changed], first)
    if base.tied and contents.config.ties and not is_one:
        raise StarmergeError(
            f"{adapter.source} changes {' and '.join(changed)} differently, and ties them "
            "(ensure_weight_tying in adapter_config.json). Set the key to false, if that was so."
        )
    return replace(adapter, untied=name_of_head(base, None, found) if base.tied else None)


def _with_ends(adapter: Adapter, base: Base, ends: Iterable[str], change: Update | str) -> Adapter:
    """Return an adapter that changes further ends of tied weights, all in one way."""
    updates, replacements = dict(adapter.updates), dict(adapter.replacements)
    for end in ends:
        if isinstance(change, str):
            replacements[end] = change
        else:
            shape = base.checkpoint[end].shape
            updates[end] = PlacedUpdate(change, shape, change.is_embedding)
    return replace(adapter, updates=updates, replacements=replacements)


def _open_alone(name: str, source: Source, base: Base, contents: AdapterContents) -> Adapter:
    """Open an adapter whose base is known by its shapes alone."""
    found = names_alone(source, contents, base.checkpoint)
    updates: dict[str, PlacedUpdate] = {}
    for update in contents.updates:
        tensor = found[update.weight]
        if update.magnitude:
            raise UsageError(
                f"{source}: the update of {update.module} is DoRA's, which is made of the base's "
                "weight. Give the base before the models."
            )
        _check_dtypes(base, tensor, contents.checkpoint, update)
        _check_shapes(source, base, tensor, contents.checkpoint, update)
        shape = base.checkpoint[tensor].shape
        updates[tensor] = PlacedUpdate(update, shape, update.is_embedding)
    return replace(_adapter(name, source, contents, updates, {}), carried=dict(contents.saved))


def names_alone(
    source: Source, contents: AdapterContents, known: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """Return the name of each weight of an adapter among those of other adapters.

    Args:
        source: The adapter.
        contents: What it holds.
        known: The weights of the other adapters, by their names there.

    Returns:
        The name by the adapter's own: the same weight's where it is known, else its own, with the
        prefix changed by which some are known.
    """
    if contents.format.is_diffusion:
        return match_parts(source, contents.names, known)
    found = match_stored(source, contents.names, {tensor: tensor for tensor in known})
    return completed(contents.names, found)


def _adapter(
    name: str,
    source: Source,
    contents: AdapterContents,
    updates: dict[str, PlacedUpdate],
    replacements: dict[str, str],
) -> Adapter:
    return Adapter(
        name,
        source,
        contents.format,
        contents.checkpoint,
        updates,
        replacements,
        contents.config,
        list(contents.beside),
    )


def _place(
    source: Source, base: Base, tensor: str, contents: AdapterContents, update: Update
) -> PlacedUpdate:
    """Check an update against the base's tensor."""
    _check_dtypes(base, tensor, contents.checkpoint, update)
    _check_shapes(source, base, tensor, contents.checkpoint, update)
    transposed = _is_transposed(source, contents.config, base, tensor, update)
    return PlacedUpdate(update, base.checkpoint[tensor].shape, transposed)


def _check_copies(
    source: Source, base: Base, contents: AdapterContents, found: Mapping[str, str]
) -> dict[str, str]:
    """Make sure that what is said, or seems, to be a copy of the base's weight is one.

    Returns:
        Keys of those that have another number of rows, by the base's names of the tables.
    """
    grown: dict[str, str] = {}
    for name, key in contents.copies.items():
        tensor = found.get(name)
        copy = contents.checkpoint[key]
        if tensor is None and base.embedding is not None:
            # The output layer, which the base's files do not hold where it is tied.
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
    """Tell whether a tensor is the base's, which may have been rounded when it was loaded.

    Of tables of tokens the rows that both have are compared.
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


def _check_all_found(
    source: Source,
    base: Base,
    contents: AdapterContents,
    found: Mapping[str, str],
    experts: Mapping[str, Update],
    head: str | None,
) -> None:
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
    for name, key in contents.saved.items():
        if name not in found and name != head:
            raise StarmergeError(
                f"{source} holds {key}, of modules_to_save in adapter_config.json, {lacks} {name}. "
                "Give a base that has the module, such as the model the training began with, "
                "saved with its new head."
            )


def _check_dtypes(base: Base, tensor: str, checkpoint: Checkpoint, update: Update) -> None:
    parts = [checkpoint[key] for key in update.keys]
    for info in (*parts, base.checkpoint[tensor]):
        if info.dtype not in MERGEABLE:
            raise StarmergeError(
                f"{info.file}: tensor {info.name} is stored in {info.dtype}, which cannot be "
                "merged. Use an unquantised checkpoint."
            )


def _check_shapes(
    source: Source, base: Base, tensor: str, checkpoint: Checkpoint, update: Update
) -> None:
    shape, target = update.change.shape, base.checkpoint[tensor].shape
    shape = shape[::-1] if update.is_embedding else shape
    may_turn = len(shape) == 2 and not update.is_embedding
    is_own = _fits(shape, target) or (may_turn and shape[::-1] == target)
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


def _fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Tell whether a change is one of a weight of some shape.

    Tools store those of kernels flat, or those of kernels of one entry without their last axes.
    """
    if len(shape) == len(target) or len(shape) != 2:
        return shape == target
    return shape == matrix_shape(target)


def _inputs(update: Update, target: tuple[int, ...]) -> int:
    """Return how many inputs a weight has that the base holds in some shape."""
    return update.change.shape[1] if len(target) == 2 else target[1]


def _is_transposed(
    source: Source, config: AdapterConfig, base: Base, tensor: str, update: Update
) -> bool:
    """Tell whether the base holds a weight as (in, out), given shapes that fit.

    An embedding's table always is so. For linear layers the shape tells. For a square weight the
    config's ``fan_in_fan_out`` does, which PEFT keeps for the whole adapter though layers may
    differ: it must agree with what the base looks like.
    """
    if update.is_embedding:
        return True
    shape, target = update.change.shape, base.checkpoint[tensor].shape
    if len(target) != 2 or shape[0] != shape[1]:
        return not (_fits(shape, target) or base.fits(tensor, shape))
    if config.fan_in_fan_out != base.stores_input_first:
        raise UsageError(
            f"{source}: fan_in_fan_out is {config.fan_in_fan_out}, but layers of the base "
            f"{base.source} say otherwise, and the square {tensor} does not tell. Fold the adapter "
            "with PEFT's merge_and_unload and give the full model."
        )
    return config.fan_in_fan_out


def _is_replacement(source: Source, base: Base, tensor: str, saved: TensorInfo) -> bool:
    """Check a tensor of a whole module; tell whether it is weights, and no counter of steps."""
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
