"""Layers and parts of a model, by the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterable

_PARTS = {
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "vision": ("vision_tower", "vision_model", "visual"),
    "projector": ("multi_modal_projector", "merger", "deepstack_merger_list"),
}
"""Parts of models, and the words in tensors' names that tell them; of several the last counts."""

PARTS = ("text", *_PARTS)
"""The parts that a model may have; "text" is what belongs to none of the others."""

_BEFORE = ("embed", "wte", "wpe", "shared", "patch", "conv1", "conv2")
"""Parts of words in the names of tensors that stand before the layers."""

_BEHIND = ("embed_out", "lm_head")
"""Words in the names of tensors that stand behind them, whatever else they are called."""

OF_ALL_LAYERS = "relative_attention_bias"
"""What T5's first layer holds for all."""


def is_of(part: str, name: str) -> bool:
    """Tell whether a tensor belongs to a part of a model; all do to the part "", the whole."""
    words = name.split(".")
    found = ["text", *(p for p, signs in _PARTS.items() if any(sign in words for sign in signs))]
    return part in ("", found[-1])


def is_before_layers(name: str) -> bool:
    """Tell whether a tensor outside of the layers stands before them, as embeddings do."""
    words = name.lower().split(".")
    if any(word in _BEHIND for word in words):
        return False
    return OF_ALL_LAYERS in words or any(sign in word for word in words for sign in _BEFORE)


def layers(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the layer of each tensor that belongs to one: its index, and how many there are.

    The layer is the first part of the name that is a number; layers whose names begin alike are
    counted together: ``encoder.layers.3.fc.weight`` is one of those of ``encoder.layers``. A name
    without a number, as that of an embedding, belongs to none.
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
    """Return a tensor's name up to its first part that is a number, the layer; else all of it."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: place + 1])


def family_of(name: str) -> str:
    """Return what the layers are called that a tensor lies in, as ``model.layers``; or nothing."""
    prefix, _, number = layer_of(name).rpartition(".")
    return prefix if number.isdecimal() else ""
