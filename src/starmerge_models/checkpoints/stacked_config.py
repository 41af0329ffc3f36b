"""The config of a stack of layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starmerge_models.errors import UsageError

_COUNTS = {
    "encoder": ("encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
"""Keys of the number of layers for each part of a model."""

_ANY_COUNT = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_transformer_layers",
    "depth",
)
"""Other keys of the number of layers."""

_LISTS = ("layer", "block", "heads", "kv_", "type", "rope", "window", "multiplier", "pattern")
"""Parts of the keys of lists that may have an entry for each layer."""

_INDICES = ("mlp_only_layers", "full_attn_idxs")
"""Keys of lists of layer numbers."""


def restacked(
    config: Mapping[str, Any],
    part: str,
    count: int,
    layers: Sequence[tuple[Mapping[str, Any], int]],
) -> dict[str, Any]:
    """Return a config with other layers.

    All occurrences of the number of layers are changed. Lists with an entry for each layer get the
    entry of each layer's own config, or of the first config if that list is missing.

    Args:
        config: Config of the first model.
        part: The part of the model with the layers; empty if only one part has layers.
        count: Number of layers of the first model.
        layers: For each layer of the stack, the config of its model, and its number there.

    Raises:
        UsageError: No known key has the number of layers.
    """
    result = copy.deepcopy(dict(config))
    found = False
    for section in _sections(result, part):
        own = result if section is None else result[section]
        theirs = [(c if section is None else c.get(section) or {}, i) for c, i in layers]
        for key in _COUNTS.get(part, _ANY_COUNT):
            if own.get(key) == count:
                own[key], found = len(layers), True
        for key, value in own.items():
            if not isinstance(value, list):
                continue
            if key in _INDICES:
                own[key] = [n for n, (c, i) in enumerate(theirs) if i in (c.get(key) or ())]
            elif len(value) == count and any(sign in key for sign in _LISTS):
                own[key] = [_entry(c.get(key), i, value) for c, i in theirs]
    if not found:
        raise UsageError(
            f"config.json has no key with the number of layers, {count}, that is known here: "
            f"{', '.join(_COUNTS.get(part, _ANY_COUNT))}."
        )
    return result


def _sections(config: Mapping[str, Any], part: str) -> Iterator[str | None]:
    """Yield the keys of the sections about a part; None for the config itself."""
    if part in ("vision", "projector"):
        yield "vision_config"
        return
    yield None
    if part in ("", "text") and isinstance(config.get("text_config"), dict):
        yield "text_config"


def _entry(values: Any, index: int, otherwise: list[Any]) -> Any:
    """Return an entry of another config's list, or of the first config's."""
    own = values if isinstance(values, list) and index < len(values) else otherwise
    return own[min(index, len(own) - 1)]
