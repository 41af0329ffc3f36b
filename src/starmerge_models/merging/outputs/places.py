"""The modules of an adapter for the updates of a base's tensors, and the modules' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.lora.adapter import Adapter
from starmerge_models.checkpoints.lora.file import PREFIX, Module, Style
from starmerge_models.checkpoints.lora.flat_names import flattened, part_of
from starmerge_models.checkpoints.names import Change, changed, names_in_model, prefix_change
from starmerge_models.merging.layout import Contents, PlannedTensor

AdapterPlace: TypeAlias = Module | str | None
"""The module that stores a tensor's factors; or the key of a weight that is stored whole; or None
if an adapter cannot store the update."""


def places_of(contents: Contents) -> dict[str, AdapterPlace]:
    """Return the place of each tensor's update in an adapter, by the tensor's name.

    Modules get the names that they have in the adapters. Modules that only full fine-tunes change
    get transformers' names, which a separate process determines. In adapters of diffusion models
    names begin with a part of the pipeline; see :func:`style_of`.
    """
    style = style_of(contents)
    if style != "peft":
        return _places_in_pipeline(contents, style)
    places: dict[str, AdapterPlace] = {}
    unnamed = []
    change = _common_change(contents)
    for tensor in contents.tensors:
        place = _place_by_models(tensor)
        if change is not None and place is not None:
            place = _renamed(place, changed(tensor.source.name, change))
        if place is None and _has_factors(contents.base, tensor):
            unnamed.append(tensor.source.name)
        places[tensor.source.name] = place
    base = contents.base
    names = {stored: name for name, stored in names_in_model(base).items()} if unnamed else {}
    for stored in unnamed:
        name = names.get(stored, stored).removesuffix(".weight")
        is_linear = len(base.checkpoint[stored].shape) == 2 and not base.is_embedding(stored)
        places[stored] = Module(
            name, base.is_lookup_table(stored), base.stores_input_first and is_linear
        )
    return places


def style_of(contents: Contents) -> Style:
    """Return the naming style of an adapter's modules, which is that of the merged adapters.

    For diffusion models it is kohya's if one of the adapters uses it, because kohya's names replace
    dots, which cannot be undone.
    """
    formats = [model.format for model in contents.models if isinstance(model, Adapter)]
    if not any(own.is_diffusion for own in formats):
        return "peft"
    return "kohya" if any(own.has_flat_names for own in formats) else "diffusers"


def _places_in_pipeline(contents: Contents, style: Style) -> dict[str, AdapterPlace]:
    """Return the places in an adapter of a diffusion model."""
    places: dict[str, AdapterPlace] = {}
    modules: dict[str, Module] = {}
    for tensor in contents.tensors:
        name, place = tensor.source.name, _place_by_models(tensor)
        places[name] = None
        if isinstance(place, Module):
            modules[name] = place
        elif place is None and _has_factors(contents.base, tensor):
            modules[name] = Module(name.removesuffix(".weight"))
    names = [module.name for module in modules.values()]
    named = flattened(names) if style == "kohya" else _in_one_part(names)
    for (stored, module), name in zip(modules.items(), named, strict=True):
        places[stored] = replace(module, name=name, style=style)
    return places


def _in_one_part(names: Sequence[str]) -> list[str]:
    """Prefix names without a part of the pipeline with the part of the others, if it is unique."""
    heads = {name.partition(".")[0] for name in names if part_of(name)[0]}
    if len(heads) != 1:
        return list(names)
    (head,) = heads
    return [name if part_of(name)[0] else f"{head}.{name}" for name in names]


def _place_by_models(tensor: PlannedTensor) -> AdapterPlace:
    """Return the place of a tensor in the adapters that change it."""
    name = tensor.source.name
    for model in tensor.models.values():
        if isinstance(model, Adapter) and name in model.replacements:
            key = model.replacements[name]
            return key if key.startswith(PREFIX) else PREFIX + key
    modules = (model.module(name) for model in tensor.models.values())
    return next((module for module in modules if module is not None), None)


def _common_change(contents: Contents) -> Change | None:
    """Return the change from stored names to those of one model, for adapters of several models.

    An adapter of the inner model lacks a prefix that the names of other adapters have. PEFT
    loads an adapter into one model, so all modules get the names of the adapter whose naming fits
    every tensor. If several fit, one with whole modules is preferred, then the one with the longest
    names, which are those of the outermost model. None is returned if all agree or none fits.
    """
    namings: dict[Change, tuple[bool, int]] = {}
    for model in contents.models:
        if isinstance(model, Adapter):
            own = {prefix_change(stored, name) for stored, name in _names_in(model).items()}
            if len(own) == 1:
                (change,) = own
                rank = bool(model.saved), len(change[1]) - len(change[0])
                namings[change] = max(rank, namings.get(change, rank))
    adapted = [
        tensor.source.name
        for tensor in contents.tensors
        if any(isinstance(model, Adapter) for model in tensor.models.values())
    ]
    fitting = [c for c in namings if all(name.startswith(c[0]) for name in adapted)]
    if len(namings) < 2 or not fitting:
        return None
    return max(fitting, key=lambda change: namings[change])


def _names_in(adapter: Adapter) -> dict[str, str]:
    """Return an adapter's names of the weights that it changes, by their stored names."""
    names = {tensor: placed.update.weight for tensor, placed in adapter.updates.items()}
    whole = {tensor: key.removeprefix(PREFIX) for tensor, key in adapter.replacements.items()}
    return names | whole


def _renamed(place: Module | str, name: str | None) -> Module | str:
    """Return a place with the name of another weight."""
    if name is None:
        return place
    return (
        PREFIX + name
        if isinstance(place, str)
        else replace(place, name=name.removesuffix(".weight"))
    )


def _has_factors(base: Base, tensor: PlannedTensor) -> bool:
    """Return whether a tensor is the weight of a module that PEFT can adapt."""
    name = tensor.source.name
    is_matrix = len(tensor.source.shape) > 1 and name.endswith(".weight")
    return is_matrix and name not in base.tied


def carried_over(contents: Contents) -> dict[str, tuple[Adapter, str]]:
    """Return the whole modules that are copied unchanged from an adapter.

    Returns:
        The adapter and its key for each module, by the key in the output.
    """
    return {
        key if key.startswith(PREFIX) else PREFIX + key: (model, key)
        for model in contents.models
        if isinstance(model, Adapter)
        for key in model.carried.values()
    }


def unadapted_modules(base: Base, modules: Mapping[str, Module]) -> list[str]:
    """Return the names of all modules of a model that are not adapted.

    PEFT refuses to load an adapter that targets a module of a kind that it cannot adapt, such as a
    whole layer.

    Args:
        base: The base.
        modules: The adapted modules, by the names of their weights in the base.
    """
    adapted = [module.name for module in modules.values()]
    if base.has_weights:
        own = {name.removesuffix(".weight") for name in modules}
        return sorted(_parents(base.checkpoint) - own)
    # For an unknown base, assume that every layer has all kinds of modules that occur.
    return [*_missing_in_layers(adapted), *(_parents(adapted) - set(adapted))]


def _parents(names: Iterable[str]) -> set[str]:
    """Return all parent modules of the owners of names: for ``a.b.weight`` a and a.b."""
    return {name[:place] for name in names for place, part in enumerate(name) if part == "."}


def _missing_in_layers(names: Sequence[str]) -> list[str]:
    """Return the names that layers lack compared to the union of all layers' names."""
    places: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        depth = next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), 0)
        places.setdefault(".".join(parts[:depth]), set()).add(".".join(parts[depth:]))
    ends = {end for layer, own in places.items() if layer for end in own}
    known = set(names)
    return [
        name for layer in places if layer for end in ends if (name := f"{layer}.{end}") not in known
    ]
