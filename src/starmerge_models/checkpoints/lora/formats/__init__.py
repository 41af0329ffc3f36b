"""The formats of adapters, detected by keys and config.

There is one module for each tool's format; :func:`read_adapter` tries them in order. Readers do not
use the base's weights: they return the file's names of modules, and a description of how each
change is computed from stored tensors (:mod:`~starmerge_models.checkpoints.lora.update`). Matching
to a base, and all later steps, are the same for all formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from starmerge_models.checkpoints.lora.formats.contents import (
    AdapterContents,
    AdapterFile,
    Factors,
    Format,
)
from starmerge_models.checkpoints.lora.formats.diffusers import Diffusers
from starmerge_models.checkpoints.lora.formats.kohya import Kohya
from starmerge_models.checkpoints.lora.formats.mlx import Mlx
from starmerge_models.checkpoints.lora.formats.peft import Peft
from starmerge_models.checkpoints.lora.formats.torchtune import Torchtune
from starmerge_models.checkpoints.opening import open_shards, open_weights
from starmerge_models.checkpoints.source import Source
from starmerge_models.checkpoints.tensors import Checkpoint
from starmerge_models.errors import UsageError
from starmerge_models.reading import read_json
from starmerge_models.storage import Place, exists, is_file, storage_of

__all__ = ["AdapterContents", "AdapterFile", "Factors", "Format", "is_adapter", "read_adapter"]

FORMATS: Sequence[Format] = (Mlx(), Torchtune(), Peft(), Kohya(), Diffusers())
"""All formats, in the order in which they are tried."""

CONFIG = "adapter_config.json"

_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model.pt",
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
"""Names of an adapter's file by PEFT, torchtune, MLX-LM and diffusers."""

_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")


def is_adapter(source: Source) -> bool:
    """Return whether a model is an adapter, by its config or by the keys of its only file.

    Raises:
        StarmergeError: The file is broken.
    """
    if is_file(source.path) or is_file(source.path / CONFIG):
        return True
    if is_file(source.path / "config.json") or _weights(source.path) is None:
        return False
    file = _open(source)
    return any(layout.recognises(file) for layout in FORMATS)


def read_adapter(source: Source, model: Mapping[str, Any]) -> AdapterContents:
    """Read an adapter's config and header, and interpret its tensors.

    Args:
        source: The adapter's folder or file.
        model: The base's ``config.json``; empty if unknown.

    Raises:
        UsageError: It is not an adapter of a known format, or of an unsupported kind.
        StarmergeError: A tensor is missing, unknown or of the wrong shape; a file is broken.
    """
    file = _open(source)
    for layout in FORMATS:
        if layout.recognises(file):
            return layout.read(file, model)
    some = ", ".join(list(file.checkpoint)[:2]) or "none at all"
    raise UsageError(
        f"{source} is no adapter of a layout that is known. Its tensors are called {some}; those "
        "of PEFT's adapters end in lora_A.weight, of kohya's in lora_down.weight. If it is a whole "
        "model, give the folder that holds it with its config.json; another tool's adapter is to "
        "be converted to PEFT's or kohya's layout by that tool."
    )


def _open(source: Source) -> AdapterFile:
    """Read an adapter's config, if it has one, and the header of its weights."""
    place = source.path
    folder = place.parent if is_file(place) else place
    weights = place if place != folder else _weights(folder) or folder / _WEIGHTS[0]
    config = folder / CONFIG
    # A single file has a config in its folder only if it has the tool's standard name.
    if not exists(config) or (place != folder and place.name not in _WEIGHTS):
        return AdapterFile(source, weights, _checkpoint(weights), None, {})
    return AdapterFile(source, weights, _checkpoint(weights), config, read_json(config))


def _checkpoint(file: Place) -> Checkpoint:
    """Read the headers of an adapter's weights.

    Args:
        file: The file, or the index of several shards, or the first shard without an index.
    """
    is_sharded = file.suffix == ".json" or _SHARD.fullmatch(file.name)
    return open_shards(file) if is_sharded else open_weights(file)


def _weights(folder: Place) -> Place | None:
    """Return the file of an adapter's weights in a folder; None if there is none.

    It has one of the tools' standard names, or is an index of shards, the first shard, or the only
    safetensors file.
    """
    for name in _WEIGHTS:
        if is_file(folder / name):
            return folder / name
    names = storage_of(folder).names(folder)
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    index = f"{_WEIGHTS[0]}.index.json"
    if index in names or shards:
        return folder / (index if index in names else shards[0])
    names = [name for name in names if name.endswith(".safetensors")]
    return folder / names[0] if len(names) == 1 else None
