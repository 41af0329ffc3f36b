"""LoRA adapters in PEFT's layout.

What the config says is read in :mod:`~starmerge.checkpoints.lora.config`, what the tensors are
in :mod:`~starmerge.checkpoints.lora.keys`, and which of the base's they mean in
:mod:`~starmerge.checkpoints.names`; here the shapes are checked and the deltas are made. Source of
the layout: github.com/huggingface/peft, ``tuners/lora/layer.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from starmerge.checkpoints.base import Base
from starmerge.checkpoints.finetuned import difference
from starmerge.checkpoints.lora.config import AdapterConfig, read_adapter_config
from starmerge.checkpoints.lora.dora import dora_delta
from starmerge.checkpoints.lora.file import Module
from starmerge.checkpoints.lora.keys import AdapterKeys, ModuleKeys, sort_keys
from starmerge.checkpoints.names import completed, match_names, match_stored
from starmerge.checkpoints.source import Source
from starmerge.checkpoints.tensors import (
    MERGEABLE,
    Checkpoint,
    TensorInfo,
    open_pickle,
    open_safetensors,
)
from starmerge.deltas import Delta, LowRank
from starmerge.errors import StarmergeError, UsageError
from starmerge.storage import Place, is_file


@dataclass(frozen=True)
class _Factors:
    """Where the parts of one tensor's delta lie, and how to read them."""

    keys: ModuleKeys
    scale: float
    transposed: bool
    """Whether the base holds the weight as (in, out), so that its update is (B·A)ᵀ."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter; its deltas are low-rank and stay so, but for DoRA and for whole modules."""

    kind = "LoRA adapter"

    name: str
    source: Source
    checkpoint: Checkpoint
    factors: dict[str, _Factors]
    replacements: dict[str, str]
    """Keys of the tensors that stand for the base's, by the base's names."""
    config: AdapterConfig
    carried: dict[str, str] = field(default_factory=dict)
    """Keys of tensors of whole modules, by their names, where nothing is known of the base's."""
    notes: tuple[str, ...] = ()
    """Sentences on it that whoever merges it should read."""
    untied: str | None = None
    """The base's name of the output layer, where the base ties it and the model does not."""

    @property
    def base_name(self) -> str | None:
        """Hub id of the base that it was trained on, as its config has it."""
        return self.config.base_hub_id

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the base's tensors that it changes."""
        return frozenset((*self.factors, *self.replacements))

    @property
    def saved(self) -> frozenset[str]:
        """Names of the tensors that it replaces, being those of ``modules_to_save``."""
        return frozenset((*self.replacements, *self.carried))

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Its factors."""
        return [self.checkpoint]

    @property
    def beside(self) -> list[Place]:
        """The config, which has the scale."""
        return [self.source.path / "adapter_config.json"]

    def inputs(self, tensor: str) -> list[TensorInfo]:
        """Return what is read for a tensor's delta."""
        if tensor in self.replacements:
            return [self.checkpoint[self.replacements[tensor]]]
        keys = self.factors[tensor].keys
        return [self.checkpoint[k] for k in (keys.a, keys.b, keys.magnitude, keys.copy) if k]

    def needs_base(self, tensor: str) -> bool:
        """Tell whether a tensor's delta is made, or checked, with the base's weight."""
        if tensor in self.replacements:
            return True
        keys = self.factors[tensor].keys
        return bool(keys.magnitude or keys.copy)

    def module(self, tensor: str) -> Module | None:
        """Return the module of a tensor as PEFT knows it; None where it is replaced whole."""
        if tensor in self.replacements:
            return None
        factors = self.factors[tensor]
        keys = factors.keys
        return Module(keys.module, keys.is_embedding, factors.transposed and not keys.is_embedding)

    def rank(self, tensor: str) -> int | None:
        """Return the rank r of a tensor's factors, None where the delta is dense."""
        if tensor in self.replacements or self.factors[tensor].keys.magnitude:
            return None
        return self.checkpoint[self.factors[tensor].keys.a].shape[0]

    def delta(self, tensor: str, base: Tensor | None) -> Delta:
        """Return s·B·A in factors, in the dtypes they are stored in.

        For a convolution that is the matrix (out, in·k), for an embedding and for layers stored
        input-first it is (B·A)ᵀ. DoRA's update and that of a whole module are dense.

        Args:
            tensor: Its name.
            base: The base's tensor, any floating dtype; None where it is not needed.

        Raises:
            StarmergeError: The adapter comes with a copy of the base's weight, which is another.
        """
        if tensor in self.replacements:
            assert base is not None, "needs_base says so"
            return difference(self.checkpoint.read(self.replacements[tensor]), base)
        factors = self.factors[tensor]
        self._check_copy(factors.keys.copy, base)
        A, B = self.checkpoint.read(factors.keys.a), self.checkpoint.read(factors.keys.b)
        update = LowRank(B.flatten(1), A.flatten(1), factors.scale)
        if factors.keys.magnitude:
            assert base is not None, "needs_base says so"
            magnitude = self.checkpoint.read(factors.keys.magnitude)
            return dora_delta(base, update, magnitude, transposed=factors.transposed)
        if factors.transposed:
            return LowRank(update.A.T, update.B.T, update.scale)
        return update

    def _check_copy(self, key: str | None, base: Tensor | None) -> None:
        if key is None or base is None:
            return
        copy = self.checkpoint.read(key)
        # The base may have been rounded when it was loaded for training, and saved wider.
        roundings = (copy.dtype, torch.bfloat16, torch.float16)
        if not any(torch.equal(copy, base.to(dtype).to(copy.dtype)) for dtype in roundings):
            raise StarmergeError(
                f"{self.source}: {key} is not the base's weight. The adapter was trained on "
                "another base, or together with that weight; then fold it with PEFT's "
                "merge_and_unload and give the full model."
            )


def open_adapter(name: str, source: Source, base: Base, *, any_base: bool = False) -> Adapter:
    """Open a LoRA adapter: read its config and header, and match every tensor to the base.

    Args:
        name: The model's name in tables and reports.
        source: The adapter's folder.
        base: The base it is to be merged into.
        any_base: Accept an adapter whose config names another base.

    Raises:
        UsageError: The adapter names another base, or is of a kind that is not merged.
        StarmergeError: A tensor is missing, unknown or of the wrong shape; a file is broken.
    """
    config = read_adapter_config(source.path / "adapter_config.json")
    if not any_base:
        config.check_base_name(base)
    checkpoint = open_weights(source.path)
    keys = sort_keys(source, config, checkpoint)
    if not base.has_weights:
        return _open_alone(name, source, base, config, checkpoint, keys)
    found = match_names(source, base, keys.names)
    _check_all_found(source, base, checkpoint, keys, found)
    factors: dict[str, _Factors] = {}
    for module in keys.modules:
        tensor = found[module.weight]
        _check_dtypes(base, tensor, checkpoint, module)
        _check_shapes(source, base, tensor, checkpoint, module)
        transposed = _is_transposed(source, config, base, tensor, checkpoint, module)
        scale = config.scale(module.module, checkpoint[module.a].shape[0])
        factors[tensor] = _Factors(module, scale, transposed)
    replacements = {
        found[saved]: key
        for saved, key in keys.saved.items()
        if _is_replacement(source, base, found[saved], checkpoint[key])
    }
    adapter = Adapter(name, source, checkpoint, factors, replacements, config)
    if not config.is_headless:
        _check_ties(adapter, base)
    return adapter


def _open_alone(
    name: str,
    source: Source,
    base: Base,
    config: AdapterConfig,
    checkpoint: Checkpoint,
    keys: AdapterKeys,
) -> Adapter:
    """Open an adapter whose base is known by its shapes alone."""
    stored = {tensor: tensor for tensor in base.checkpoint}
    weights = [module.weight for module in keys.modules]
    found = completed(weights, match_stored(source, weights, stored))
    factors: dict[str, _Factors] = {}
    for module in keys.modules:
        tensor = found[module.weight]
        if module.magnitude:
            raise UsageError(
                f"{source}: the update of {module.module} is DoRA's, which is made of the base's "
                "weight. Give the base before the models."
            )
        _check_dtypes(base, tensor, checkpoint, module)
        _check_shapes(source, base, tensor, checkpoint, module)
        scale = config.scale(module.module, checkpoint[module.a].shape[0])
        factors[tensor] = _Factors(replace(module, copy=None), scale, module.is_embedding)
    return Adapter(name, source, checkpoint, factors, {}, config, dict(keys.saved))


def open_weights(folder: Place) -> Checkpoint:
    """Read the headers of an adapter's weights in a folder.

    Raises:
        StarmergeError: There are none, or they are broken.
    """
    file, pickle = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if is_file(pickle) and not is_file(file):
        return open_pickle(pickle)
    return open_safetensors(file)


def _check_all_found(
    source: Source, base: Base, checkpoint: Checkpoint, keys: AdapterKeys, found: dict[str, str]
) -> None:
    lacks = f"but the base {base.source} has no tensor"
    for module in keys.modules:
        if module.weight in found:
            continue
        shape = (checkpoint[module.b].shape[0], *checkpoint[module.a].shape[1:])
        for tied in base.tied:
            if base.checkpoint[tied].shape in (shape, shape[::-1]):
                raise StarmergeError(
                    f"{source} adapts {module.module}, {lacks} {module.weight}: it is tied to "
                    f"another, probably {tied} (tie_word_embeddings in config.json). Untie the "
                    "base first, so that its files hold both, or do not adapt it."
                )
        raise StarmergeError(
            f"{source} adapts {module.module}, {lacks} {module.weight}. The adapter was trained on "
            "another model, or on a weight that this one ties to another. If transformers renames "
            "the base's tensors when it loads them, install transformers 5 or later, which knows "
            "the names, or fold the adapter with PEFT's merge_and_unload and give the full model."
        )
    for name, key in keys.saved.items():
        if name not in found:
            raise StarmergeError(
                f"{source} holds {key}, of modules_to_save in adapter_config.json, {lacks} {name}. "
                "Give a base that has the module, such as the model the training began with, "
                "saved with its new head."
            )


def _check_dtypes(base: Base, tensor: str, checkpoint: Checkpoint, module: ModuleKeys) -> None:
    parts = [checkpoint[key] for key in (module.a, module.b, module.magnitude) if key]
    for info in (*parts, base.checkpoint[tensor]):
        if info.dtype not in MERGEABLE:
            raise StarmergeError(
                f"{info.file}: tensor {info.name} is stored in {info.dtype}, which cannot be "
                "merged. Use an unquantised checkpoint."
            )


def _check_shapes(
    source: Source, base: Base, tensor: str, checkpoint: Checkpoint, module: ModuleKeys
) -> None:
    a, b = checkpoint[module.a].shape, checkpoint[module.b].shape
    target = base.checkpoint[tensor].shape
    if _is_grouped(a, b, target):
        raise UsageError(
            f"{source} adapts {module.module}, a convolution in groups. Its factors mix the "
            "groups, which the base's weight cannot. Train without it in target_modules."
        )
    fits = len(a) == len(b) > 1 and 0 < a[0] == b[1] and math.prod(b[2:]) == 1
    if not fits or (module.is_embedding and len(a) != 2):
        raise StarmergeError(
            f"{source}: the factors of {tensor} do not fit together: B {list(b)}, A {list(a)}."
        )
    shape = (b[0], *a[1:])
    allowed = {shape} if len(shape) > 2 else {shape, shape[::-1]}
    if module.is_embedding:
        shape = shape[::-1]
        allowed = {shape}
    if target not in allowed:
        raise StarmergeError(
            f"{source}: the update of {tensor} has the shape {list(shape)}, in the base "
            f"{base.source} it is {list(target)}. The adapter was trained on another model."
        )
    if module.copy and checkpoint[module.copy].shape != target:
        raise StarmergeError(
            f"{source}: {module.copy} has the shape {list(checkpoint[module.copy].shape)}, in the "
            f"base {base.source} it is {list(target)}. The adapter was trained on another base, "
            "or with another vocabulary."
        )
    if module.magnitude and checkpoint[module.magnitude].size != b[0]:
        raise StarmergeError(
            f"{source}: {module.magnitude} has {checkpoint[module.magnitude].size} entries, and "
            f"{tensor} has {b[0]} outputs."
        )


def _is_transposed(
    source: Source,
    config: AdapterConfig,
    base: Base,
    tensor: str,
    checkpoint: Checkpoint,
    module: ModuleKeys,
) -> bool:
    """Tell whether the base holds a weight as (in, out), given shapes that fit.

    An embedding's table always is so. For linear layers the shape tells. For a square weight the
    config's ``fan_in_fan_out`` does, which PEFT keeps for the whole adapter though layers may
    differ: it must agree with what the base looks like.
    """
    if module.is_embedding:
        return True
    target = base.checkpoint[tensor].shape
    shape = (checkpoint[module.b].shape[0], *checkpoint[module.a].shape[1:])
    if len(shape) > 2 or shape[0] != shape[1]:
        return target != shape
    if config.fan_in_fan_out != base.stores_input_first:
        raise UsageError(
            f"{source}: fan_in_fan_out is {config.fan_in_fan_out}, but layers of the base "
            f"{base.source} say otherwise, and the square {tensor} does not tell. Fold the adapter "
            "with PEFT's merge_and_unload and give the full model."
        )
    return config.fan_in_fan_out


def _is_grouped(a: tuple[int, ...], b: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Tell a convolution in g groups: A reads all inputs, the base's weight a g-th of them."""
    if not 2 < len(a) == len(b) == len(target) or 0 in (b[1], target[1]):
        return False
    groups = a[1] // target[1]
    return groups > 1 and a[1] == groups * target[1] and a[0] == groups * b[1]


def _is_replacement(source: Source, base: Base, tensor: str, saved: TensorInfo) -> bool:
    """Check a tensor of a whole module; tell whether it is weights, and no counter of steps."""
    stored = base.checkpoint[tensor]
    if saved.shape != stored.shape:
        raise StarmergeError(
            f"{source}: {saved.name}, of modules_to_save in adapter_config.json, has the shape "
            f"{list(saved.shape)}, in the base {base.source} it is {list(stored.shape)}. The "
            "module was resized, or the adapter was trained on another model."
        )
    if (saved.dtype in MERGEABLE) != (stored.dtype in MERGEABLE):
        raise StarmergeError(
            f"{source}: {saved.name} is stored in {saved.dtype}, in the base {base.source} in "
            f"{stored.dtype}; they cannot be subtracted. Use unquantised checkpoints."
        )
    return saved.dtype in MERGEABLE


def _check_ties(adapter: Adapter, base: Base) -> None:
    """Refuse a delta for one end of tied weights: folding it would change the other end too."""
    for tensor in base.tied:
        if tensor in adapter.tensors:
            raise StarmergeError(
                f"{adapter.source} changes {tensor} alone, which the base ties to other tensors "
                "(tie_word_embeddings in config.json): both ends of the model would change. Untie "
                "the base first, so that its files hold both; or set the key to false, if the "
                "model puts out no tokens and ties nothing."
            )
