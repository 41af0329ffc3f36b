"""Writing a LoRA adapter as the tools read it that the merged ones came from.

For PEFT, and every server that takes its files, one file ``adapter_model.safetensors`` and an
``adapter_config.json`` with one rank and ``lora_alpha = r``, so that the scale is 1 and B·A is the
update; no patterns, no rsLoRA, no DoRA. Source of the layout: github.com/huggingface/peft,
``tuners/lora/layer.py`` and ``utils/save_and_load.py``. For diffusion models one file with the
names of kohya's scripts, and ``alpha = r`` for each module, or with those of diffusers, which takes
the rank for alpha where there is none; see :mod:`~starmerge_models.checkpoints.lora.formats`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from starmerge_models.checkpoints.writer import OutputTensor

Style: TypeAlias = Literal["peft", "kohya", "diffusers"]
"""Whose names the factors have."""

_AFFIXES: dict[Style, tuple[str, str, str]] = {
    "peft": ("base_model.model.", ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": ("", ".lora_A.weight", ".lora_B.weight"),
}
"""What stands before a module's name, and behind it for A and for B."""

WEIGHTS: dict[Style, str] = {
    "peft": "adapter_model.safetensors",
    "kohya": "pytorch_lora_weights.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
}
"""The file of an adapter in a folder, as what loads it looks for it."""

CONFIG = "adapter_config.json"
PREFIX = _AFFIXES["peft"][0]


@dataclass(frozen=True)
class Module:
    """A module of the model that an adapter changes."""

    name: str
    """As its tool knows it."""
    is_embedding: bool = False
    """Whether it looks rows up, as torch's Embedding does; its weight is (rows, width)."""
    is_transposed: bool = False
    """Whether the base holds its weight as (in, out), as GPT-2's Conv1D does."""
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
        """Return the tensors that the scale is computed of, as alpha/r."""
        return {f"{self.name}.alpha": torch.tensor(float(r))} if self.style == "kohya" else {}

    def layout(self, shape: tuple[int, ...], r: int, dtype: torch.dtype) -> list[OutputTensor]:
        """Return how A and B are stored.

        Args:
            shape: Of the base's weight.
            r: The rank.
            dtype: Of the factors.
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
        """Return A and B, matrices, of an update ``left @ right`` of the base's weight.

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
        modules: The modules that have factors.
        r: Their rank.
        targets: Ends of the modules' names; see :func:`target_modules`.
        saved: Ends of the names of the modules that are stored whole.
        base_name: Hub id or path of the base.
        task_type: PEFT's type of task.
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
    """Return the shortest ends of names that mean the adapted modules and no others.

    PEFT adapts a module whose name is an entry, or ends in a dot and the entry. Last parts of the
    names, such as ``q_proj``, are what servers expect; where such an end would mean a module that
    is not adapted, the full names of those with that end stand in its place; so where the end is a
    number, which layers have too.

    Args:
        adapted: Names of the adapted modules.
        others: Names of the other modules of the model, those that hold modules among them.
    """
    taken = {_end(name) for name in others}
    return sorted(
        {name if (end := _end(name)) in taken or end.isdecimal() else end for name in adapted}
    )


def _end(name: str) -> str:
    return name.rpartition(".")[2]
