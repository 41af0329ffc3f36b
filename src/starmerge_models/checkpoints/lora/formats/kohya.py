"""Single files of kohya's sd-scripts, and of LyCORIS and OneTrainer, which use the same names.

A module is named by its part of the pipeline and its path with underscores instead of dots:
``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``. Source:
github.com/kohya-ss/sd-scripts, ``networks/lora.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starmerge_models.checkpoints.lora.config import AdapterConfig
from starmerge_models.checkpoints.lora.formats.contents import AdapterContents, AdapterFile
from starmerge_models.checkpoints.lora.formats.diffusers import split_key
from starmerge_models.checkpoints.lora.formats.parts import (
    PARTS,
    by_module,
    unknown_key,
    updates_of,
)
from starmerge_models.errors import StarmergeError

_KEY = re.compile(r"(?P<module>(?:lora|lycoris)_[^.]+)\.(?P<part>.+)")

_TOOL = "kohya's networks/merge_lora.py or LyCORIS' tools/merge.py"


class Kohya:
    """The format of kohya's sd-scripts."""

    title = "adapter of kohya's layout"
    is_diffusion = True
    has_flat_names = True

    def recognises(self, file: AdapterFile) -> bool:
        """Recognise the first key: a path without dots, and a part."""
        return any(_KEY.fullmatch(key) for key in file.checkpoint)

    def read(self, file: AdapterFile, model: Mapping[str, Any]) -> AdapterContents:
        """Group the keys by module, and interpret each change."""
        keys: dict[str, tuple[str, str]] = {}
        for key in file.checkpoint:
            match = _KEY.fullmatch(key)
            if match is None and split_key(key) is not None:
                raise StarmergeError(
                    f"{file.source} mixes layouts: {next(iter(keys), 'others')} is of kohya's, and "
                    f"{key} of diffusers' or ComfyUI's. Save each part as an adapter of its own, "
                    "or convert one with diffusers' convert_state_dict_to_kohya."
                )
            if match is None or match["part"] not in PARTS:
                raise unknown_key(file, key, _TOOL)
            keys[key] = match["module"], PARTS[match["part"]]
        updates = [
            update
            for module, parts in by_module(file, keys).items()
            for update in updates_of(file, module, parts)
        ]
        return AdapterContents(self, file.checkpoint, updates, AdapterConfig(file.weights, {}))
