"""Adapters in PEFT's layout.

``adapter_config.json`` is read in :mod:`~starmerge_models.checkpoints.lora.config`, the keys are
sorted in
:mod:`~starmerge_models.checkpoints.lora.formats.peft_keys`. Source: github.com/huggingface/peft,
``tuners/lora/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from starmerge_models.checkpoints.lora.config import AdapterConfig, read_adapter_config
from starmerge_models.checkpoints.lora.file import PREFIX
from starmerge_models.checkpoints.lora.formats.contents import AdapterContents, AdapterFile, Factors
from starmerge_models.checkpoints.lora.formats.peft_keys import ModuleKeys, sort_keys
from starmerge_models.checkpoints.lora.update import Magnitude, Product, Update
from starmerge_models.errors import StarmergeError, UsageError


class Peft:
    """The format of Hugging Face's PEFT."""

    title = "LoRA adapter"
    is_diffusion = False
    has_flat_names = False

    def recognises(self, file: AdapterFile) -> bool:
        """Recognise the config, after formats of other tools with a config, or the keys."""
        return file.config is not None or any(key.startswith(PREFIX) for key in file.checkpoint)

    def read(self, file: AdapterFile, model: Mapping[str, Any]) -> AdapterContents:
        """Read config and keys, and check that the factors fit together."""
        if file.config is None:
            raise StarmergeError(
                f"{file.weights} is of PEFT's layout, and has no config beside it "
                "(adapter_config.json), which says what its updates are scaled by. Fetch it, too, "
                "and give the folder of both."
            )
        config = read_adapter_config(file.config)
        keys = sort_keys(file.source, config, file.checkpoint)
        for first, second in keys.twice:
            if not torch.equal(file.checkpoint.read(first), file.checkpoint.read(second)):
                raise StarmergeError(
                    f"{file.source} holds {first} and {second}, which are to be the same and are "
                    "not. Which of them counts cannot be told; remove the other."
                )
        return AdapterContents(
            self,
            file.checkpoint,
            [_update(file, config, module) for module in keys.modules],
            config,
            keys.saved,
            tuple(_factors(file, config, module) for module in keys.parameters),
            keys.copies,
            frozenset(keys.undeclared),
            (file.config,),
        )


def _factors(file: AdapterFile, config: AdapterConfig, keys: ModuleKeys) -> Factors:
    """Return the factors of a parameter, checked against each other."""
    a, b = file.checkpoint[keys.a].shape, file.checkpoint[keys.b].shape
    if len(a) != 2 or len(b) != 2 or not 0 < a[0] == b[1]:
        raise StarmergeError(
            f"{file.source}: the factors of {keys.module} do not fit together: B {list(b)}, A "
            f"{list(a)}."
        )
    module = keys.module.replace(".base_layer", "")
    return Factors(module, keys.a, keys.b, tuple(config.parameters_of(module)))


def _update(file: AdapterFile, config: AdapterConfig, module: ModuleKeys) -> Update:
    a, b = file.checkpoint[module.a].shape, file.checkpoint[module.b].shape
    if _is_grouped(a, b):
        raise UsageError(
            f"{file.source} adapts {module.module}, a convolution in groups. Its factors mix the "
            "groups, which the base's weight cannot. Train without it in target_modules."
        )
    fits = len(a) == len(b) > 1 and 0 < a[0] == b[1] and math.prod(b[2:]) == 1
    if not fits or (module.is_embedding and len(a) != 2):
        raise StarmergeError(
            f"{file.source}: the factors of {module.weight} do not fit together: B {list(b)}, A "
            f"{list(a)}."
        )
    magnitude = None
    if module.magnitude:
        size = file.checkpoint[module.magnitude].size
        if size != b[0]:
            raise StarmergeError(
                f"{file.source}: {module.magnitude} has {size} entries, and {module.weight} has "
                f"{b[0]} outputs."
            )
        magnitude = Magnitude(module.magnitude)
    scale = config.scale(module.module, a[0])
    change = Product(module.a, module.b, scale, (b[0], *a[1:]), a[0])
    return Update(module.module, change, module.is_embedding, magnitude)


def _is_grouped(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return whether factors are of a grouped convolution: A has rank r·g, B has r columns."""
    if not 2 < len(a) == len(b) or 0 in (a[0], b[1]):
        return False
    return a[0] > b[1] and a[0] % b[1] == 0
