"""The LoRA layers of a loaded model: what each adapter changes, and room for one more.

Source of the layout: github.com/huggingface/peft, ``tuners/lora/layer.py`` and ``mapping.py``.
Diffusers and transformers put the same layers into their models without PEFT's wrapper.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from starmerge_models.checkpoints.base import is_embedding_name
from starmerge_models.checkpoints.finetuned import difference
from starmerge_models.checkpoints.lora.config import AdapterConfig, checked_config
from starmerge_models.checkpoints.lora.dora import dora_delta
from starmerge_models.checkpoints.lora.file import Module, adapter_config, target_modules
from starmerge_models.checkpoints.tensors import MERGEABLE
from starmerge_models.deltas import Delta, LowRank
from starmerge_models.errors import StarmergeError, UsageError

_ROUNDING = 1e-6
"""How much a scale may differ from the one of the adapter's config, relative to it."""

_UNQUANTISED = "Load the base unquantised, or merge the saved adapters with the base's files."


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """A layer of a loaded model that some adapters change."""

    name: str
    """The layer's name in the model; in a pipeline behind that of the component."""
    layer: LoraLayer
    module: Module
    """The layer as an adapter's file knows it."""
    shape: tuple[int, ...]
    """Of the weight that the layer holds."""
    is_embedding: bool
    """Whether each row of the weight stands for a token or a position."""

    @property
    def weight(self) -> str:
        """The name of the weight."""
        return f"{self.name}.weight"

    def has(self, adapter: str) -> bool:
        """Tell whether an adapter changes the layer."""
        return _has(self.layer, adapter)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in, …) and B (out, r, 1, …) of an adapter, where they lie."""
        return _factors(self.layer, adapter)

    def rank(self, adapter: str) -> int | None:
        """Return the rank of an adapter's change; None: it is dense, being DoRA's."""
        if adapter in self.layer.lora_magnitude_vector:
            return None
        return int(self.factors(adapter)[0].shape[0])

    def dtype(self, adapters: Iterable[str]) -> torch.dtype:
        """Return the narrowest dtype that holds the factors of some adapters."""
        factors = (factor.dtype for adapter in adapters for factor in self.factors(adapter))
        return reduce(torch.promote_types, factors)

    def check_base(self, where: str) -> None:
        """Make sure that the weight has values that can be computed with.

        Raises:
            UsageError: It is quantised or offloaded.
        """
        weight = getattr(self.layer.get_base_layer(), "weight", None)
        if weight is None or tuple(weight.shape) != self.shape:
            raise UsageError(
                f"{where}, whose weight is packed, and the merge needs its values. {_UNQUANTISED}"
            )
        check_readable(weight, where)

    def base(self) -> Tensor:
        """Return the weight that the adapters are added to, on the CPU in its own dtype."""
        weight: Tensor = self.layer.get_base_layer().weight
        return weight.detach().cpu()

    def delta(self, adapter: str) -> Delta:
        """Return the change of the weight by an adapter, on the CPU, scale included.

        As :meth:`starmerge_models.checkpoints.lora.adapter.Adapter.delta` of the same adapter in a
        file: in factors, of DoRA dense, in the orientation of the weight.
        """
        A, B = (factor.detach().cpu().flatten(1) for factor in self.factors(adapter))
        change = LowRank(B, A, _initial_scale(self.layer, adapter))
        if adapter in self.layer.lora_magnitude_vector:
            magnitude = self.layer.lora_magnitude_vector[adapter].weight.detach().cpu()
            return dora_delta(self.base(), change, magnitude, transposed=self.module.flips)
        return LowRank(change.A.T, change.B.T, change.scale) if self.module.flips else change

    def check(self, adapter: str) -> None:
        """Make sure that an adapter's change is one that can be merged.

        Raises:
            UsageError: The layer is of a kind that is not merged; the scale is not the config's; a
                weight that is needed is quantised or offloaded.
        """
        where = f"The adapter {adapter!r} changes {self.name}"
        kinds = {ParamWrapper: "parameters of experts", MultiheadAttention: "a fused attention"}
        for kind, words in kinds.items():
            if isinstance(self.layer, kind):
                raise UsageError(
                    f"{where}, {words}, and no merged adapter is made of such layers. Merge the "
                    "saved adapters into a model: starmerge merge BASE ADAPTERS -o OUT."
                )
        A, B = self.factors(adapter)
        if A.shape[0] != B.shape[1]:
            raise UsageError(
                f"{where}, a convolution in groups. Its factors mix the groups, which the base's "
                "weight cannot. Train without it in target_modules."
            )
        for factor in (A, B):
            check_readable(factor, where)
        if self.rank(adapter) is None:
            self.check_base(where)
        now, initial = float(self.layer.scaling[adapter]), _initial_scale(self.layer, adapter)
        if not math.isclose(now, initial, rel_tol=_ROUNDING):
            raise UsageError(
                f"{where} {now / initial:.6g} times as strongly as its config says: somebody has "
                "scaled it in the model, as set_adapters does with adapter_weights. Set it back to "
                "1, and give the factor to the merge as a weight (weights=[…])."
            )


@dataclass(frozen=True, eq=False)
class SavedTensor:
    """A tensor of a module that some adapters replace whole (``modules_to_save``)."""

    name: str
    """Its name in the model; in a pipeline behind that of the component."""
    wrapper: ModulesToSaveWrapper
    path: str
    """The module's name in the model."""
    key: str
    """The tensor's name in the module."""
    is_embedding: bool

    @property
    def weight(self) -> str:
        """Its name."""
        return self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base's tensor."""
        return tuple(self._base.shape)

    def dtype(self, adapters: Iterable[str]) -> torch.dtype:
        """Return the dtype of the base's tensor, which the merged one gets."""
        return self._base.dtype

    def check_base(self, where: str) -> None:
        """Do nothing: the base's tensor is checked together with each adapter's."""

    def has(self, adapter: str) -> bool:
        """Tell whether an adapter replaces the tensor."""
        return adapter in self.wrapper.modules_to_save

    def rank(self, adapter: str) -> None:
        """Return None: the change is dense."""
        return

    def base(self) -> Tensor:
        """Return the tensor that the adapters replace, on the CPU in its own dtype."""
        return self._base.detach().cpu()

    def delta(self, adapter: str) -> Delta:
        """Return the difference of an adapter's tensor from the base's, on the CPU."""
        return difference(self._tuned(adapter).detach().cpu(), self.base())

    def check(self, adapter: str) -> None:
        """Make sure that both tensors have values that can be subtracted.

        Raises:
            UsageError: One is quantised or offloaded, or the module was resized.
        """
        where = f"The adapter {adapter!r} replaces {self.name}"
        tuned = self._tuned(adapter)
        for tensor in (tuned, self._base):
            check_readable(tensor, where)
        if tuned.shape != self._base.shape:
            raise UsageError(
                f"{where} with the shape {list(tuned.shape)}, in the base it is "
                f"{list(self._base.shape)}. Resized modules are not merged."
            )

    def put(self, adapter: str, values: Tensor) -> None:
        """Give an adapter's tensor its values, and let none of its module be trained."""
        self.wrapper.modules_to_save[adapter].requires_grad_(False)
        self._tuned(adapter).copy_(values)

    @property
    def _base(self) -> Tensor:
        return _tensors(self.wrapper.original_module)[self.key]

    def _tuned(self, adapter: str) -> Tensor:
        return _tensors(self.wrapper.modules_to_save[adapter])[self.key]


def check_readable(tensor: Tensor, where: str) -> None:
    """Make sure that a tensor of a loaded model has values, and floating-point ones.

    Raises:
        UsageError: It has none, or is quantised.
    """
    if tensor.is_meta:
        raise UsageError(
            f"{where}, whose tensors have no values in memory: they are offloaded. Load the model "
            "without offloading, or merge the saved adapters."
        )
    if tensor.dtype not in MERGEABLE:
        raise UsageError(
            f"{where}, whose tensors are in {tensor.dtype}, and the merge needs them as "
            f"floating-point numbers. {_UNQUANTISED}"
        )


@dataclass(frozen=True, eq=False)
class Component:
    """A model that holds adapters: by itself, or as a component of a pipeline."""

    name: str
    """The component's name; empty for a model by itself."""
    model: nn.Module
    """The model whose layers PEFT has replaced, without PEFT's wrapper."""
    configs: Mapping[str, Any]
    """PEFT's configs by the names of the adapters."""

    @cached_property
    def layers(self) -> dict[str, AdaptedLayer]:
        """The layers that some adapter changes, by their names in the model."""
        return {
            name: self._layer(name, module)
            for name, module in _lora_layers(self.model, *self.configs)
        }

    @cached_property
    def saved(self) -> list[SavedTensor]:
        """The weights of the modules that some adapter replaces whole; not counters of steps."""
        return [
            SavedTensor(
                self.named(f"{name}.{key}"),
                module,
                name,
                key,
                self._is_table(f"{name}.{key}", tensor.shape, module),
            )
            for name, module in self.model.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
            for key, tensor in _tensors(module.original_module).items()
            if tensor.is_floating_point() or tensor.ndim > 0
        ]

    @property
    def places(self) -> list[AdaptedLayer | SavedTensor]:
        """All that adapters change."""
        return [*self.layers.values(), *self.saved]

    def named(self, name: str) -> str:
        """Return a name of the model's with the component's before it."""
        return f"{self.name}.{name}" if self.name else name

    def config(self, adapter: str) -> AdapterConfig:
        """Return an adapter's config, checked as that of a file is.

        Raises:
            UsageError: The adapter is of a kind that is not merged.
        """
        content = self.configs[adapter].to_dict()
        plain = {key: sorted(v) if isinstance(v, set) else v for key, v in content.items()}
        return checked_config(Path(f"adapter {self.named(adapter)}"), plain)

    def check(self) -> None:
        """Make sure that the adapters are beside the weights, and not merged into them.

        Raises:
            UsageError: They are merged into them.
        """
        for name, module in self.model.named_modules():
            merged = getattr(module, "merged_adapters", None)
            if isinstance(module, BaseTunerLayer) and merged:
                raise UsageError(
                    f"The adapters {', '.join(map(repr, merged))} are merged into the weights of "
                    f"{self.named(name)}. Take them out first: model.unmerge_adapter(), or "
                    "unfuse_lora() of a pipeline."
                )

    @property
    def modules(self) -> Iterator[str]:
        """The names of the model's own modules, without what PEFT has put into them."""
        layers = tuple(f"{name}." for name in (*self.layers, *(s.path for s in self.saved)))
        for name, _ in self.model.named_modules():
            if name and not name.startswith(layers):
                yield name

    def add(
        self,
        adapter: str,
        r: int,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        whole: Mapping[str, Mapping[str, Tensor]],
        like: Sequence[str],
    ) -> None:
        """Add an adapter of the scale 1; if that fails, the model is as it was.

        Which adapters are active, and which parameters are trained, stays as it was; the new
        adapter is neither.

        Args:
            adapter: Its name.
            r: Its rank.
            factors: A and B as matrices (k, in·k') and (out, k) with k ≤ r, by the names of the
                layers in this model.
            whole: Tensors of modules that it replaces, by the names of module and tensor.
            like: Names of the merged adapters. Factors go where those of the first of them lie that
                changes the layer.
        """
        adapted = {name: self.layers[name].module for name in factors}
        own = [self.configs[name] for name in like if name in self.configs]
        tasks = {config.task_type for config in own}
        content = adapter_config(
            adapted.values(),
            r=r,
            targets=target_modules(list(adapted), [n for n in self.modules if n not in adapted]),
            saved=sorted({end for config in own for end in config.modules_to_save or ()}),
            base_name=own[0].base_model_name_or_path,
            task_type=tasks.pop() if len(tasks) == 1 else None,
        )
        # Tensors of inference mode could never be trained.
        with torch.inference_mode(False), _unchanged(self.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT says to those who add an adapter to train
            try:
                inject_adapter_in_model(LoraConfig(**content), self.model, adapter)
                added = {name for name, module in _lora_layers(self.model, adapter)}
                added |= {saved.path for saved in self.saved if saved.has(adapter)}
                if added != {*factors, *whole}:
                    raise StarmergeError(
                        f"PEFT has added {adapter!r} to other layers than asked for, such as "
                        f"{min(added ^ {*factors, *whole})}."
                    )
                for name, pair in factors.items():
                    layer = self.layers[name]
                    device = layer.factors(next(n for n in like if layer.has(n)))[0].device
                    _put(layer.layer, adapter, [factor.to(device) for factor in pair])
                for saved in self.saved:
                    if saved.has(adapter):
                        saved.put(adapter, whole[saved.path][saved.key])
            except BaseException:
                self.remove(adapter)
                raise

    def remove(self, adapter: str) -> None:
        """Remove an adapter, as far as it is there."""
        with _unchanged(self.model):
            for layer in self.layers.values():
                layer.layer.delete_adapter(adapter)
            for saved in self.saved:
                saved.wrapper.delete_adapter(adapter, new_active_adapters=None)
            self.model.peft_config.pop(adapter, None)  # type: ignore[union-attr, operator]

    def _layer(self, name: str, layer: LoraLayer) -> AdaptedLayer:
        base = layer.get_base_layer()
        looks_up = isinstance(base, nn.Embedding)
        is_turned = bool(getattr(layer, "fan_in_fan_out", False))
        module = Module(name, looks_up, is_turned and not looks_up)
        A, B = _factors(layer, next(name for name in self.configs if _has(layer, name)))
        shape = (B.shape[0], *A.shape[1:])
        shape = shape[::-1] if module.flips else shape
        is_table = self._is_table(name, shape, layer)
        return AdaptedLayer(self.named(name), layer, module, shape, is_table)

    def _is_table(self, name: str, shape: Sequence[int], module: nn.Module) -> bool:
        """Tell whether each row of a weight stands for a token or a position."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        is_named = any(map(is_embedding_name, self.named(name).lower().split(".")))
        return len(shape) == 2 and (is_named or module is head)


def components_of(model: object) -> list[Component]:
    """Return what holds adapters: a model itself, or components of a pipeline.

    Raises:
        UsageError: Nothing does.
    """
    if hasattr(model, "_orig_mod"):
        raise UsageError("The model is compiled. Give the plain one: model._orig_mod.")
    parts = {"": model} if isinstance(model, nn.Module) else getattr(model, "components", None)
    found = [
        _component(name, part)
        for name, part in (parts.items() if isinstance(parts, dict) else ())
        if isinstance(part, nn.Module)
    ]
    holding = [component for component in found if component.configs]
    if not holding:
        raise UsageError(
            f"The {type(model).__name__} holds no adapters. Give a PeftModel with the adapters "
            "loaded into it (load_adapter), or a diffusers pipeline (load_lora_weights with an "
            "adapter_name)."
        )
    return holding


def _component(name: str, model: nn.Module) -> Component:
    if isinstance(model, PeftMixedModel):
        raise UsageError(
            "A PeftMixedModel holds adapters of several kinds. Load those of LoRA into a PeftModel."
        )
    if isinstance(model, PeftModel):
        return Component(name, model.get_base_model(), model.peft_config)
    return Component(name, model, getattr(model, "peft_config", {}))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers, detached and sharing their memory, by name."""
    return {str(name): tensor for name, tensor in module.state_dict().items()}


def _lora_layers(model: nn.Module, *adapters: str) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the layers that one of some adapters changes, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and any(_has(module, adapter) for adapter in adapters):
            yield name, module


def _has(layer: LoraLayer, adapter: str) -> bool:
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def _factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


def _put(layer: LoraLayer, adapter: str, factors: Sequence[Tensor]) -> None:
    """Give a new adapter of a layer its factors, padded with zeros to its rank."""
    padded = []
    for axis, (room, factor) in enumerate(zip(_factors(layer, adapter), factors, strict=True)):
        whole = factor.new_zeros(room.shape)
        whole.narrow(axis, 0, factor.shape[axis]).copy_(
            factor.reshape(*room.shape[:axis], factor.shape[axis], *room.shape[axis + 1 :])
        )
        padded.append(nn.Parameter(whole, requires_grad=False))
    A, B = padded
    if adapter in layer.lora_A:
        layer.lora_A[adapter].weight, layer.lora_B[adapter].weight = A, B
    else:
        layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter] = A, B


def _initial_scale(layer: LoraLayer, adapter: str) -> float:
    """Return s of an adapter: alpha/r, or alpha/√r with rsLoRA, by the patterns of its config."""
    r = layer.r[adapter]
    return float(layer.lora_alpha[adapter] / (math.sqrt(r) if layer.use_rslora[adapter] else r))


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Leave it as it is which adapters are active, and which parameters are trained.

    PEFT has no other way to tell: what adds an adapter to a model without a wrapper makes it the
    active one.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    active = [(m, m._active_adapter) for m in model.modules() if isinstance(m, kinds)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, names in active:
            module._active_adapter = names
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)
