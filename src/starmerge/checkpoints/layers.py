"""Layers of a model, by the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterable


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
