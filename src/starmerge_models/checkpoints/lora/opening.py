"""Opening of adapters: the updates of a file are matched to the base and checked against it.

Files of all tools are read in :mod:`~starmerge_models.checkpoints.lora.formats`, and their names
are matched to the base's in :mod:`~starmerge_models.checkpoints.names` and
:mod:`~starmerge_models.checkpoints.lora.flat_names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.lora.adapter import Adapter, PlacedUpdate
from starmerge_models.checkpoints.lora.checks import (
    check_all_found,
    check_copies,
    check_dtypes,
    check_shapes,
    is_replacement,
    is_transposed,
    lacks_modules,
)
from starmerge_models.checkpoints.lora.experts import joined_updates, single_updates
from starmerge_models.checkpoints.lora.flat_names import match_flat, match_parts
from starmerge_models.checkpoints.lora.formats import AdapterContents, read_adapter
from starmerge_models.checkpoints.lora.ties import head_not_stored, with_tied_ends
from starmerge_models.checkpoints.lora.update import Update
from starmerge_models.checkpoints.matching import in_words
from starmerge_models.checkpoints.names import completed, match_names, match_stored
from starmerge_models.checkpoints.source import Source
from starmerge_models.checkpoints.tensors import TensorInfo
from starmerge_models.errors import StarmergeError, UsageError


def open_adapter(
    name: str, source: Source, base: Base, *, any_base: bool = False, common: bool = False
) -> Adapter:
    """Open an adapter: read its config and header, and match every tensor to the base.

    Copies of the base's weights in the file are compared with them.

    Args:
        name: The model's name in tables and reports.
        source: The adapter's folder, or its file.
        base: The base of the merge.
        any_base: Accept an adapter whose config names another base.
        common: Leave out whole modules that the base lacks, such as a head.

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
    grown = check_copies(source, base, contents, found)
    head = None if contents.config.is_headless else head_not_stored(base, contents, found)
    left = [update for update in contents.updates if update.weight not in found]
    experts = joined_updates(source, base, contents)
    experts |= single_updates(source, base, contents, left)
    check_all_found(source, base, contents, found, experts, head)
    lacking = [saved for saved in contents.saved if saved not in found and saved != head]
    if lacking and not common:
        raise StarmergeError(lacks_modules(source, base, contents, lacking))
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
        if saved in found and is_replacement(source, base, found[saved], contents.checkpoint[key])
    }
    adapter = replace(_adapter(name, source, contents, placed, replacements), copies=grown)
    if lacking:
        words = in_words(lacking, [*found, *contents.names])
        note = f"{name}: of the adapter, {words} is left out, which the base lacks."
        adapter = replace(adapter, notes=(*adapter.notes, note))
    if contents.config.is_headless:
        return adapter
    return with_tied_ends(adapter, base, contents, found, head)


def _open_alone(name: str, source: Source, base: Base, contents: AdapterContents) -> Adapter:
    """Open an adapter for a base of which only shapes are known."""
    found = names_alone(source, contents, base.checkpoint)
    updates: dict[str, PlacedUpdate] = {}
    for update in contents.updates:
        tensor = found[update.weight]
        if update.magnitude:
            raise UsageError(
                f"{source}: the update of {update.module} is DoRA's, which is made of the base's "
                "weight. Give the base before the models."
            )
        check_dtypes(base, tensor, contents.checkpoint, update)
        check_shapes(source, base, tensor, contents.checkpoint, update)
        shape = base.checkpoint[tensor].shape
        updates[tensor] = PlacedUpdate(update, shape, update.is_embedding)
    return replace(_adapter(name, source, contents, updates, {}), carried=dict(contents.saved))


def names_alone(
    source: Source, contents: AdapterContents, known: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """Match the weights of an adapter to those of other adapters.

    Args:
        source: The adapter.
        contents: The content of the adapter.
        known: The weights of the other adapters, by name.

    Returns:
        For each of the adapter's names, the known name of the same weight; for other weights, the
        adapter's name with the prefix change of the matched ones.
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
        list(contents.other_files),
    )


def _place(
    source: Source, base: Base, tensor: str, contents: AdapterContents, update: Update
) -> PlacedUpdate:
    """Check an update against the base's tensor."""
    check_dtypes(base, tensor, contents.checkpoint, update)
    check_shapes(source, base, tensor, contents.checkpoint, update)
    transposed = is_transposed(source, contents.config, base, tensor, update)
    return PlacedUpdate(update, base.checkpoint[tensor].shape, transposed)
