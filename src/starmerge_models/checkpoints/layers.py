"""Layers and parts of a model, recognised by the names of tensors."""

from __future__ import annotations

from collections.abc import Iterable

_PARTS = {
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "vision": ("vision_tower", "vision_model", "visual"),
    "projector": ("multi_modal_projector", "merger", "deepstack_merger_list"),
}
"""Parts of models, with the words in tensors' names by which they are recognised; the last word of
a name decides."""

PARTS = ("text", *_PARTS)
"""The parts that a model may have; tensors of no other part belong to "text"."""

_BEFORE = ("embed", "wte", "wpe", "shared", "patch", "conv1", "conv2")
"""Parts of words in the names of tensors that are applied before the layers."""

_BEHIND = ("embed_out", "lm_head")
"""Words in the names of tensors that are applied after the layers; they take precedence."""

OF_ALL_LAYERS = "relative_attention_bias"
"""The tensor of T5's first layer that all layers use."""


def is_of(part: str, name: str) -> bool:
    """Return whether a tensor belongs to a part of a model; the part "" is the whole model."""
    words = name.split(".")
    found = ["text", *(p for p, signs in _PARTS.items() if any(sign in words for sign in signs))]
    return part in ("", found[-1])


def is_before_layers(name: str) -> bool:
    """Return whether a tensor outside of the layers is applied before them, like embeddings."""
    words = name.lower().split(".")
    if any(word in _BEHIND for word in words):
        return False
    return OF_ALL_LAYERS in words or any(sign in word for word in words for sign in _BEFORE)


def layers(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the layer of each tensor in a layer: its index, and the number of layers.

    The layer is the first part of the name that is a number. Layers with the same prefix are
    counted together: ``encoder.layers.3.fc.weight`` belongs to ``encoder.layers``. Names without a
    number, such as those of embeddings, have no layer.
    """
    places: dict[str, tuple[str, int]] = {}
    counts: dict[str, int] = {}
    for name in names:
        prefix, _, number = layer_of(name).rpartition(".")
        if number.isdecimal():
            places[name] = prefix, int(number)
            counts[prefix] = max(counts.get(prefix, 0), int(number) + 1)
    return {name: (index, counts[prefix]) for name, (prefix, index) in places.items()}


def layer_of(name: str) -> str:
    """Return a tensor's name up to and including its layer number; the whole name without one."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: place + 1])


def family_of(name: str) -> str:
    """Return the prefix of a tensor's layers, such as ``model.layers``; empty without a layer."""
    prefix, _, number = layer_of(name).rpartition(".")
    return prefix if number.isdecimal() else ""
