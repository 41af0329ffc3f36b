"""Layout of a written LoRA adapter, in the format of the merged adapters.

For PEFT, and all servers that read its files, the adapter is ``adapter_model.safetensors`` and an
``adapter_config.json`` with one rank and ``lora_alpha = r``, so that the scale is 1 and B·A is the
update; no patterns, no rsLoRA, no DoRA. Source of the layout: github.com/huggingface/peft,
``tuners/lora/layer.py`` and ``utils/save_and_load.py``. For diffusion models it is one file with
the names of kohya's scripts and ``alpha = r`` for each module, or with the names of diffusers,
which uses the rank as the default of alpha; see
:mod:`~starmerge_models.checkpoints.lora.formats`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from starmerge_models.checkpoints.writer import OutputTensor

Style: TypeAlias = Literal["peft", "kohya", "diffusers"]
"""The tool whose names the factors have."""

_AFFIXES: dict[Style, tuple[str, str, str]] = {
    "peft": ("base_model.model.", ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": ("", ".lora_A.weight", ".lora_B.weight"),
}
"""Prefix of a module's name, and the suffixes for A and B."""

WEIGHTS: dict[Style, str] = {
    "peft": "adapter_model.safetensors",
    "kohya": "pytorch_lora_weights.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
}
"""Name of the adapter's file in a folder, which the loader expects."""

CONFIG = "adapter_config.json"
PREFIX = _AFFIXES["peft"][0]


@dataclass(frozen=True)
class Module:
    """A module of the model that an adapter changes."""

    name: str
    """The module's name in the adapter's tool."""
    is_embedding: bool = False
    """Whether it is an embedding like torch's Embedding; its weight is (rows, width)."""
    is_transposed: bool = False
    """Whether the base stores its weight as (in, out), as in GPT-2's Conv1D."""
    style: Style = "peft"

    @property
    def flips(self) -> bool:
        """Whether the base's weight is the transpose of PEFT's B·A."""
        return self.is_embedding or self.is_transposed

    def keys(self) -> tuple[str, str]:
        """Return the names of A and B in the file."""
        if self.is_embedding and self.style == "peft":
            return (
                f"{PREFIX}{self.name}.lora_embedding_A",
                f"{PREFIX}{self.name}.lora_embedding_B",
            )
        prefix, a, b = _AFFIXES[self.style]
        return f"{prefix}{self.name}{a}", f"{prefix}{self.name}{b}"

    def alpha(self, r: int) -> dict[str, Tensor]:
        """Return the alpha tensors from which the tool computes the scale alpha/r."""
        return {f"{self.name}.alpha": torch.tensor(float(r))} if self.style == "kohya" else {}

    def layout(self, shape: tuple[int, ...], r: int, dtype: torch.dtype) -> list[OutputTensor]:
        """Return the layouts of A and B.

        Args:
            shape: Shape of the base's weight.
            r: The rank.
            dtype: Dtype of the factors.
        """
        outputs, inputs = shape[0], shape[1:]
        if self.flips:
            outputs, inputs = shape[1], shape[:1]
        shapes = (r, *inputs), (outputs, r, *(1 for _ in inputs[1:]))
        return [
            OutputTensor(key, dtype, shape, torch.Size(shape).numel() * dtype.itemsize)
            for key, shape in zip(self.keys(), shapes, strict=True)
        ]

    def factors(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matrices A and B for an update ``left @ right`` of the base's weight.

        Args:
            left: (m, r).
            right: (r, n).
        """
        return (left.T, right.T) if self.flips else (right, left)


def adapter_config(
    modules: Iterable[Module],
    *,
    r: int,
    targets: Sequence[str],
    saved: Sequence[str],
    base_name: str | None,
    task_type: str | None,
) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``.

    Args:
        modules: The modules with factors.
        r: Their rank.
        targets: Suffixes of the modules' names; see :func:`target_modules`.
        saved: Suffixes of the names of the modules that are stored whole.
        base_name: Hub id or path of the base.
        task_type: PEFT's task type.
    """
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": any(module.is_transposed for module in modules),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {},
        "target_modules": sorted(targets),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def target_modules(adapted: Collection[str], others: Iterable[str]) -> list[str]:
    """Return the shortest suffixes of names that match the adapted modules and no others.

    PEFT adapts a module whose name is an entry, or ends in a dot and the entry. Servers expect the
    last parts of names, such as ``q_proj``. If such a suffix would match a module that is not
    adapted, or is a number like that of a layer, the full names are used instead.

    Args:
        adapted: Names of the adapted modules.
        others: Names of all other modules of the model, including containers.
    """
    taken = {_end(name) for name in others}
    return sorted(
        {name if (end := _end(name)) in taken or end.isdecimal() else end for name in adapted}
    )


def _end(name: str) -> str:
    return name.rpartition(".")[2]
