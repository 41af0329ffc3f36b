"""Single files with the modules' names of diffusers, ComfyUI or the model's authors.

``unet.down_blocks.0.attentions.0.proj_in.lora_A.weight`` as diffusers writes it today, with PEFT's
names for the factors; ``….lora.down.weight`` and ``….processor.to_q_lora.down.weight`` as it did;
``diffusion_model.….lora_A.weight`` or ``.lora_down.weight`` as ComfyUI and trainers for it do.
Sources: github.com/huggingface/diffusers, ``loaders/lora_base.py`` and
``utils/state_dict_utils.py``; github.com/comfyanonymous/ComfyUI, ``comfy/weight_adapter/lora.py``.

The scale is alpha/r with an alpha in the file, or that of the LoRA configs in the header
(``lora_adapter_metadata``); without either it is 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starmerge_models.checkpoints.lora.config import AdapterConfig, checked_config
from starmerge_models.checkpoints.lora.formats.contents import AdapterContents, AdapterFile
from starmerge_models.checkpoints.lora.formats.parts import (
    PARTS,
    Scale,
    by_module,
    unknown_key,
    updates_of,
)
from starmerge_models.errors import StarmergeError
from starmerge_models.parsing import parse_json

METADATA = "lora_adapter_metadata"
"""Header key under which diffusers stores the LoRA configs of a pipeline's parts, as JSON."""

_ENDS = sorted(PARTS, key=len, reverse=True)

_OF_PROCESSOR = re.compile(r"(?P<module>.+)\.processor\.(?P<name>to_(?:q|k|v|out))_lora")
_OF_ENCODER = re.compile(r"(?P<module>text_encoder.*)\.(?P<name>to_(?:q|k|v|out))_lora")
_ENCODER_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

_TOOL = "the pipeline's fuse_lora of diffusers"


class Diffusers:
    """The format of diffusers and ComfyUI."""

    title = "adapter of diffusers' layout"
    is_diffusion = True
    has_flat_names = False

    def recognises(self, file: AdapterFile) -> bool:
        """Recognise keys of a path with dots and a suffix of a known part."""
        return any(split_key(key) is not None for key in file.checkpoint)

    def read(self, file: AdapterFile, model: Mapping[str, Any]) -> AdapterContents:
        """Group the keys by module, and interpret each change."""
        keys = {}
        for key in file.checkpoint:
            found = split_key(key)
            if found is None:
                raise unknown_key(file, key, _TOOL)
            keys[key] = found
        scale = _scale(file)
        updates = [
            update
            for module, parts in by_module(file, keys).items()
            for update in updates_of(file, module, parts, scale)
        ]
        return AdapterContents(self, file.checkpoint, updates, AdapterConfig(file.weights, {}))


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into its module and the part of the change; None for other keys."""
    for ending in _ENDS:
        if key.endswith(f".{ending}"):
            return _module(key.removesuffix(f".{ending}")), PARTS[ending]
    for ending, part in (("_lora.down.weight", "down"), ("_lora.up.weight", "up")):
        if key.endswith(ending):
            return _module(key.removesuffix(ending) + "_lora"), part
    return None


def _module(name: str) -> str:
    """Return a module's name without the attention processor that old files contain."""
    if match := _OF_PROCESSOR.fullmatch(name):
        own = match["name"]
        return f"{match['module']}.{'to_out.0' if own == 'to_out' else own}"
    if match := _OF_ENCODER.fullmatch(name):
        return f"{match['module']}.{_ENCODER_NAMES[match['name']]}"
    return name


def _scale(file: AdapterFile) -> Scale | None:
    """Return the scales of the header; None without any.

    Raises:
        UsageError: A config in it has more than plain LoRA.
        StarmergeError: The header is broken, or lacks a module's part of the pipeline.
    """
    text = file.checkpoint.metadata.get(METADATA)
    if text is None:
        return None
    where = f"{file.weights}: {METADATA} in the header"
    try:
        content = parse_json(text.encode())
    except ValueError as error:
        raise StarmergeError(f"{where} is not JSON: {error}. Is the file complete?") from error
    if not isinstance(content, dict):
        raise StarmergeError(f"{where} is no object of LoRA configs. Is the file complete?")
    # A pipeline has a config for each part; a model that is saved alone has one without a part.
    settings: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        part, _, own = key.rpartition(".")
        settings.setdefault(part, {"peft_type": "LORA"})[own] = value
    configs = {
        part: checked_config(Path(f"{file.weights} ({part or METADATA})"), own)
        for part, own in settings.items()
    }

    def scale(module: str, rank: int) -> float:
        part, _, name = ("", "", module) if "" in configs else module.partition(".")
        if part not in configs:
            raise StarmergeError(
                f"{where} has no config for {part}, so the scale of {module} is unknown. Remove "
                "the entry from the header: then all scales are 1."
            )
        return configs[part].scale(name, rank)

    return scale
