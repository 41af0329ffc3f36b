"""LoRA adapters in PEFT's layout.

The config is read strictly: a key that changes what the adapter computes is either applied or
refused, and a tensor that no rule consumes is an error. Source of the layout and of the scales:
github.com/huggingface/peft, ``tuners/lora/config.py`` and ``tuners/lora/layer.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from starmerge.checkpoints.base import Base
from starmerge.checkpoints.source import Source, read_json
from starmerge.checkpoints.tensors import (
    MERGEABLE,
    Checkpoint,
    TensorInfo,
    open_safetensors,
)
from starmerge.deltas import LowRank
from starmerge.errors import StarmergeError, UsageError

_READ = {
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "alpha_pattern",
    "rank_pattern",
    "fan_in_fan_out",
    "init_lora_weights",
}
"""Keys that are looked at below."""

_HARMLESS = {
    "auto_mapping",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
"""Keys of training and of bookkeeping."""

_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA works only while it runs",
    "arrow_config": "a router of adapters cannot be folded into weights",
    "bias": "trained biases are not merged yet; train with bias='none'",
    "layer_replication": "the adapter replicates layers that the base does not have",
    "lora_bias": "trained biases are not merged yet; train with lora_bias=False",
    "modules_to_save": "whole modules saved beside the factors are not merged yet",
    "monteclora_config": "this variant of LoRA is not s·B·A",
    "target_parameters": "parameters adapted outside of modules are not merged yet",
    "trainable_token_indices": "trained token rows are not merged yet",
    "use_bdlora": "this variant of LoRA is not s·B·A",
    "use_dora": "DoRA's update is not s·B·A. Fold it with PEFT's merge_and_unload and give the "
    "full model",
    "use_qalora": "this variant of LoRA is not s·B·A",
}
"""Keys that must be unset (None, False, empty, 'none'), and why."""

_NEUTRAL: tuple[object, ...] = (None, False, "none", (), [], {})

_PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights as they are."""

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Factors:
    """Where the factors of one tensor's delta lie, and how to read them."""

    b: str
    a: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter; its deltas are low-rank and stay so."""

    kind = "LoRA adapter"

    name: str
    source: Source
    checkpoint: Checkpoint
    factors: dict[str, _Factors]

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the base's tensors that it changes."""
        return frozenset(self.factors)

    @property
    def files(self) -> list[Path]:
        """The files its deltas are read from."""
        return [self.source.path / "adapter_config.json", *self.checkpoint.files]

    def nbytes(self, tensor: str) -> int:
        """Return the bytes to read for a tensor's delta."""
        factors = self.factors[tensor]
        return self.checkpoint[factors.a].nbytes + self.checkpoint[factors.b].nbytes

    def rank(self, tensor: str) -> int:
        """Return the rank r of a tensor's factors."""
        return self.checkpoint[self.factors[tensor].a].shape[0]

    def delta(self, tensor: str, base: Tensor) -> LowRank:
        """Return s·B·A in factors, in the dtype they are stored in.

        Args:
            tensor: Its name.
            base: The base's tensor; only full fine-tunes need it.
        """
        factors = self.factors[tensor]
        A, B = self.checkpoint.read(factors.a), self.checkpoint.read(factors.b)
        if factors.transposed:
            A, B = B.T, A.T
        return LowRank(B, A, factors.scale)


def open_adapter(name: str, source: Source, base: Base, *, any_base: bool = False) -> Adapter:
    """Open a LoRA adapter: read its config and header, and match every factor to the base.

    Args:
        name: The model's name in tables and reports.
        source: The adapter's folder.
        base: The base it is to be merged into.
        any_base: Accept an adapter whose config names another base.

    Raises:
        UsageError: The adapter names another base, or is of a kind that is not merged.
        StarmergeError: A tensor is missing, unknown or of the wrong shape; a file is broken.
    """
    config_file = source.path / "adapter_config.json"
    config = read_json(config_file)
    _check_config(config_file, config)
    if not any_base:
        _check_base_name(config_file, config, base)
    checkpoint = _open_factors(source.path)
    factors: dict[str, _Factors] = {}
    for module, a, b in _pairs(source, checkpoint):
        tensor = f"{module}.weight"
        if tensor in factors:
            raise StarmergeError(f"{source} holds the factors of {module} twice: {a} is one.")
        if tensor not in base.checkpoint:
            raise StarmergeError(
                f"{source} adapts {module}, but the base {base.source} has no tensor {tensor}. "
                "The adapter was trained on another model, or on a weight that this one ties to "
                "another."
            )
        _check_factors(source, base, tensor, checkpoint[a], checkpoint[b])
        transposed = _is_transposed(source, config, base, tensor, checkpoint[a], checkpoint[b])
        scale = _scale(config_file, config, module, checkpoint[a].shape[0])
        factors[tensor] = _Factors(b, a, scale, transposed)
    return Adapter(name, source, checkpoint, factors)


def _check_config(file: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UsageError(f"{file}: peft_type is {kind!r}; only LORA adapters can be merged.")
    for key, reason in _REFUSED.items():
        if config.get(key) not in _NEUTRAL:
            raise UsageError(f"{file}: {key} is {config[key]!r}, and {reason}.")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_INITIALISATIONS:
        raise UsageError(
            f"{file}: init_lora_weights is {start!r}, which changes the base's weights. Convert "
            "the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    # A newer PEFT writes keys that this list lacks; unset ones change nothing.
    unknown = {key for key in config if config[key] not in _NEUTRAL}
    unknown -= _READ | _HARMLESS | _REFUSED.keys()
    if unknown:
        key = min(unknown)
        raise UsageError(
            f"{file}: the key {key!r} ({config[key]!r}) is unknown, and may change what the "
            "adapter computes. Fold it with PEFT's merge_and_unload and give the full model."
        )
    for key in ("r", "lora_alpha"):
        if not _is_number(config.get(key)):
            raise StarmergeError(f"{file}: {key} is missing or is not a finite number.")


def _check_base_name(file: Path, config: dict[str, Any], base: Base) -> None:
    trained_on = str(config.get("base_model_name_or_path") or "")
    known = base.source.name
    # A path says nothing of what lies there; two Hub ids do.
    is_hub_id = trained_on.count("/") == 1 and not trained_on.startswith((".", "/", "~"))
    if known and is_hub_id and trained_on.lower() != known.lower():
        raise UsageError(
            f"{file}: base_model_name_or_path is {trained_on}, but the base is {known}. If both "
            "are the same weights, say so with --any-base."
        )


def _open_factors(folder: Path) -> Checkpoint:
    file = folder / "adapter_model.safetensors"
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise StarmergeError(
            f"{folder} has its factors in adapter_model.bin. Save it again with "
            "save_pretrained(safe_serialization=True)."
        )
    return open_safetensors(file)


def _pairs(source: Source, checkpoint: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """Yield module, key of A and key of B for every pair of factors."""
    modules: dict[str, dict[str, str]] = {}
    for key in checkpoint:
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise StarmergeError(
                f"{source}: the tensor {key} is no LoRA factor of a linear layer, so the adapter "
                "is more than s·B·A. Fold it with PEFT's merge_and_unload and give the full model."
            )
        modules.setdefault(match["module"], {})[match["factor"]] = key
    if not modules:
        raise StarmergeError(f"{source} holds no tensors.")
    for module, keys in modules.items():
        if len(keys) < 2:
            present, missing = ("A", "B") if "A" in keys else ("B", "A")
            raise StarmergeError(f"{source}: {module} has lora_{present} but no lora_{missing}.")
        yield module.removeprefix(_PREFIX), keys["A"], keys["B"]


def _check_factors(source: Source, base: Base, tensor: str, a: TensorInfo, b: TensorInfo) -> None:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise StarmergeError(
            f"{source}: the factors of {tensor} do not fit together: B {list(b.shape)}, "
            f"A {list(a.shape)}."
        )
    for info in (a, b, base.checkpoint[tensor]):
        if info.dtype not in MERGEABLE:
            raise StarmergeError(
                f"{info.file}: tensor {info.name} is stored in {info.dtype}, which cannot be "
                "merged. Use an unquantised checkpoint."
            )


def _is_transposed(
    source: Source, config: dict[str, Any], base: Base, tensor: str, a: TensorInfo, b: TensorInfo
) -> bool:
    """Tell whether the base holds a weight as (in, out), so that its update is (B·A)ᵀ.

    The shape tells. For a square weight the config's ``fan_in_fan_out`` does, which PEFT keeps for
    the whole adapter though layers may differ: it must agree with what the base looks like.
    """
    target = base.checkpoint[tensor].shape
    shape = (b.shape[0], a.shape[1])
    if target not in (shape, shape[::-1]):
        raise StarmergeError(
            f"{source}: the update of {tensor} has the shape {list(shape)}, in the base "
            f"{base.source} it is {list(target)}. The adapter was trained on another model."
        )
    if shape[0] != shape[1]:
        return target != shape
    transposed = bool(config.get("fan_in_fan_out"))
    if transposed != base.stores_input_first:
        raise UsageError(
            f"{source}: fan_in_fan_out is {transposed}, but layers of the base "
            f"{base.source} say otherwise, and the square {tensor} does not tell. Fold the adapter "
            "with PEFT's merge_and_unload and give the full model."
        )
    return transposed


def _scale(file: Path, config: dict[str, Any], module: str, rank: int) -> float:
    """Return s: alpha/r, or alpha/√r with rsLoRA; alpha and r may depend on the module."""
    declared = _of_module(file, config, "rank_pattern", module, config["r"])
    if declared != rank:
        raise StarmergeError(
            f"{file}: the rank of {module} is {declared} here and {rank} in the tensors, so the "
            "scale of its update is unknown. Is the config that of another adapter?"
        )
    alpha = _of_module(file, config, "alpha_pattern", module, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(file: Path, config: dict[str, Any], key: str, module: str, default: float) -> float:
    """Return what the first matching pattern under ``key`` says of a module, or the default."""
    patterns = config.get(key) or {}
    try:
        matching = (
            value
            for pattern, value in patterns.items()
            if re.match(rf"(.*\.)?({pattern})$", module)
        )
        value = next(matching, default)
        if _is_number(value):
            return value
    except (re.error, AttributeError) as error:
        raise StarmergeError(f"{file}: {key} is no mapping of patterns: {error}.") from error
    raise StarmergeError(f"{file}: {key} gives {module} the value {value!r}, which is no number.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
