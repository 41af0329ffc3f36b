"""mergekit's merge methods, with settings for each tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from starmerge_models.checkpoints.layers import is_before_layers, is_of
from starmerge_models.deltas import Delta, Dense, LowRank, matrix_shape
from starmerge_models.errors import UsageError
from starmerge_models.mergekit.family import FAMILY, magnitude_mask, merge_sparsified, outlier_mask
from starmerge_models.mergekit.multislerp import multislerp
from starmerge_models.mergekit.ram import ram
from starmerge_models.mergekit.settings import (
    BASE,
    Resolved,
    Setting,
    Slice,
    read_settings,
    resolve,
)
from starmerge_models.mergekit.single import arcee_fusion, nearswap
from starmerge_models.methods.dare import kept
from starmerge_models.methods.della import as_rows, check_keep_probabilities
from starmerge_models.methods.karcher import Karcher
from starmerge_models.methods.kinds.combination import combine_bytes
from starmerge_models.methods.kinds.entrywise import panel_bytes, panels
from starmerge_models.methods.kinds.masks import keep_probabilities, l1_factor
from starmerge_models.methods.linear import Linear
from starmerge_models.methods.memory import DeltaShape, TensorShape, dense_shape
from starmerge_models.methods.method import (
    Deltas,
    Merge,
    TensorContext,
    method,
    refuse_weights,
    sums_to_zero,
)
from starmerge_models.methods.model_stock import ModelStock
from starmerge_models.methods.nuslerp import NuSlerp
from starmerge_models.methods.sce import Sce
from starmerge_models.methods.slerp import Slerp

_SINGLE_MODEL = ("nearswap", "arcee_fusion", "passthrough")
"""Methods that take exactly one model besides the base."""

_SUMS = ("linear", "passthrough")
"""Methods that are weighted sums of the weights."""

_NATIVE = ("slerp", "nuslerp", "karcher", "model_stock", "sce")
"""Other methods with an implementation in starmerge."""


@dataclass(frozen=True)
class _MergeContext:
    """The models and the settings of a tensor."""

    slice_number: int | None
    models: tuple[str, ...]
    """Names of the models, including the base if it is one of the merged models."""
    tensor: TensorContext
    """The tensor, with its layer index within the slice."""

    def weights(self, found: Resolved) -> tuple[float, ...]:
        """Return the weights of the models, or their scale; 1 if the method has neither."""
        return tuple(own.get("weight", own.get("scale", 1.0)) for own in found.own)

    def with_weights(self, found: Resolved) -> TensorContext:
        """Return the tensor's context for a merge of these models; the base has a zero delta."""
        return dataclasses.replace(self.tensor, tasks=self.models, weights=self.weights(found))

    def chosen(self, deltas: Deltas) -> Deltas:
        """Return the deltas of these models, by their index in :attr:`models`."""
        numbers = {name: number for number, name in enumerate(self.models)}
        return deltas.renumbered(
            {t: numbers[name] for t, name in enumerate(self.tensor.tasks) if name in numbers}
        )


@method("mergekit")
class Mergekit(Merge):
    """A merge method of mergekit, with settings that may differ between tensors.

    ``starmerge merge recipe.yaml`` translates a mergekit recipe into this method. The first of the
    ``settings`` that matches the parameter, the model and the tensor applies: ``filter`` is a
    substring of the tensor's name, and a list of values is interpolated over the layers.

    linear, slerp, nuslerp, karcher, model_stock and sce are starmerge's methods of these names.
    passthrough is the base times ``scale``. multislerp is the weighted mean of directions with the
    weighted mean length; nearswap takes steps of at most t; arcee_fusion takes the entries of one
    model with the largest effect on its softmax; ram is the mean over the models that changed an
    entry; ramplus_tl also amplifies entries of a single model. The others are mergekit's task
    arithmetic: x_i = w_i δ_i, where δ_i is W_i − W_0 after sparsification; then λ Σ x_i, in ties,
    dare_ties, breadcrumbs_ties and della over the entries with the elected sign; divided by Σ w_i
    if normalised. Random draws are those of ``dare`` and ``della``, by seed, model, tensor and
    position.

    Source: mergekit 0.1.5, arXiv 2403.13257, github.com/arcee-ai/mergekit. Differences: everything
    is computed in float64 and rounded once; of equal magnitudes at a threshold the first are kept.
    Cost: as for the methods; the task-arithmetic family has the entries of all tasks in memory.
    When to use: for existing mergekit recipes.
    """

    merge_method: Annotated[
        Literal[
            "linear",
            "slerp",
            "nuslerp",
            "karcher",
            "model_stock",
            "sce",
            "multislerp",
            "nearswap",
            "arcee_fusion",
            "ram",
            "ramplus_tl",
            "passthrough",
            "task_arithmetic",
            "ties",
            "dare_linear",
            "dare_ties",
            "breadcrumbs",
            "breadcrumbs_ties",
            "della",
            "della_linear",
        ],
        Field(description="mergekit's name of the method"),
    ] = "task_arithmetic"
    settings: Annotated[
        tuple[Setting, ...],
        Field(description="parameter, value, model, filter, slice; the first match applies"),
    ] = ()
    with_base: Annotated[
        bool, Field(description="whether the base is one of the models: in settings, model: base")
    ] = False
    of_weights: Annotated[
        bool, Field(description="nuslerp, multislerp: of weights, without the base as a model")
    ] = False
    slices: Annotated[
        tuple[Slice, ...],
        Field(description="for runs of layers or parts of the model: models, layers, part"),
    ] = ()
    seed: Annotated[int, Field(ge=0, description="seed of what is dropped")] = 0

    scaled_inputs = False

    @field_validator("settings")
    @classmethod
    def _read(cls, settings: tuple[Setting, ...], info: ValidationInfo) -> tuple[Setting, ...]:
        if "merge_method" not in info.data:
            return settings
        return read_settings(info.data["merge_method"], settings)

    def parameters(self) -> dict[str, Any]:
        """Return the parameters by name, as JSON-serialisable data."""
        settings = [setting.model_dump(exclude_none=True) for setting in self.settings]
        slices = [own.model_dump(exclude_defaults=True) for own in self.slices]
        for own in slices:
            own["models"] = list(own["models"])
        return super().parameters() | {"settings": settings, "slices": slices}

    @property
    def needs_base(self) -> bool:
        """True if the method uses the base's weights, or settings depend on the layer."""
        return True

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Compare the settings with the models; see :meth:`Method.check`."""
        refuse_weights(self, tasks, weights, "its weights are in its settings")
        if BASE in tasks:
            raise UsageError(f"mergekit: {BASE!r} is the base's name. Give the model another name.")
        groups = [own.models for own in self.slices] or [self._inputs(tasks)]
        known = (*tasks, BASE)
        for name in (name for group in groups for name in group):
            if name not in known:
                raise UsageError(
                    f"mergekit: a slice merges {name!r}, which is not one of the models: "
                    f"{', '.join(known)}."
                )
        inputs = {name for group in groups for name in group}
        for setting in self.settings:
            if setting.model is not None and setting.model not in inputs:
                raise UsageError(
                    f"mergekit: the setting of {setting.parameter!r} is for {setting.model!r}, "
                    f"which is not one of the models: {', '.join(sorted(inputs))}."
                )
        for group in groups:
            self._check_count(group, tensors)

    def _check_count(self, models: Sequence[str], tensors: Sequence[str]) -> None:
        """Refuse a number of models that the method does not support."""
        counted = {"slerp": Slerp(), "nuslerp": NuSlerp(), "model_stock": ModelStock()}
        if self.merge_method in counted:
            counted[self.merge_method].check(models, (1.0,) * len(models), tensors)
        if self.merge_method in _SINGLE_MODEL and len(models) != 1:
            raise UsageError(
                f"{self.merge_method}: there are {len(models)} models ({', '.join(models)}) "
                "besides the base. It takes exactly one."
            )

    def check_tensors(self, merged: Sequence[TensorContext], left: Sequence[TensorContext]) -> None:
        """Resolve the settings of all tensors; see :meth:`Method.check_tensors`."""
        self._check_layers((*merged, *left))
        for tensor in merged:
            place = self._place(tensor)
            if place is None:
                continue
            found = self._resolved(place)
            for own in found.own:
                if "epsilon" in own:
                    check_keep_probabilities(own["density"], own["epsilon"])
            if found.shared.get("normalize_weights") and sums_to_zero(place.weights(found)):
                raise UsageError(
                    "multislerp: the weights sum to zero, and it divides by their sum. Change one, "
                    "or set normalize_weights to false."
                )
            if self.merge_method in _SUMS:
                self._linear(found).check_tensors([place.with_weights(found)], [])
        if self.merge_method in _SUMS:
            for tensor in left:
                if (place := self._place(tensor)) is not None:
                    found = self._resolved(place)
                    if self.merge_method == "passthrough" and place.weights(found) != (1.0,):
                        raise UsageError(
                            f"passthrough: the scale of {tensor.name}, which no adapter changes, "
                            "is not 1. Merge the adapter first, and scale the result."
                        )
                    self._linear(found).check_tensors([], [place.with_weights(found)])

    def _check_layers(self, tensors: Sequence[TensorContext]) -> None:
        """Make sure that the slices have as many layers as the model."""
        for part in {own.part for own in self.slices if own.layers is not None}:
            wanted = sum(own.layers or 0 for own in self.slices if own.part == part)
            counts = {t.layer[1] for t in tensors if t.layer is not None and is_of(part, t.name)}
            if counts != {wanted}:
                raise UsageError(
                    f"mergekit: the slices of the {part or 'model'} have {wanted} layers, and the "
                    f"base has {' or '.join(map(str, sorted(counts))) or 'none'}."
                )

    def keeps_base(self, tensor: TensorContext) -> bool:
        """True for layers that are passed through unchanged; see :meth:`Merge.keeps_base`."""
        if self.merge_method != "passthrough":
            return False
        place = self._place(tensor)
        return place is None or place.weights(self._resolved(place)) == (1.0,)

    def memory(self, tensor: TensorShape) -> int:
        """Return the bytes needed; see :meth:`Method.memory`."""
        if self.merge_method in _SUMS:
            return tensor.deltas_nbytes + Linear(normalize=False).memory(tensor)
        if self.merge_method == "sce":
            return Sce(select_topk=0.5).memory(tensor)
        if self.merge_method == "arcee_fusion":
            # The importance of all entries in float64, and a few panels; a vector is a panel.
            return tensor.deltas_nbytes + 12 * tensor.size + panel_bytes(tensor, 2, numbers=12)
        if self.merge_method in ("ram", "ramplus_tl", "nearswap"):
            # A panel of rows of all task vectors, their activity masks, and their shares.
            numbers = 6 * len(tensor.deltas) + 2
            return tensor.deltas_nbytes + 4 * tensor.size + panel_bytes(tensor, numbers=numbers)
        if self.merge_method not in FAMILY:
            return combine_bytes(tensor, "columns", with_base=True)
        # A mask for each task. While computing a mask: all entries (of factors first in float64),
        # and arrays for ranking and drawing, at most fifty bytes per entry.
        thinning = 0 if FAMILY[self.merge_method].thinning == "none" else 50 * tensor.size
        masks = len(tensor.deltas) * tensor.size
        panels = panel_bytes(tensor, numbers=6 * len(tensor.deltas))
        return tensor.deltas_nbytes + masks + max(thinning, panels + 4 * tensor.size)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Merge.result`."""
        return dense_shape(tensor)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        place = self._place(tensor)
        nothing = _nothing(tensor)
        if place is None:
            return nothing
        found = self._resolved(place)
        inputs = place.with_weights(found)
        own = place.chosen(deltas)
        # The tensor may be changed only by models of another slice.
        own = own if len(own) else Deltas.of({0: nothing})
        if self.merge_method in FAMILY:
            return self._arithmetic(own, inputs, found)
        if self.merge_method in _SUMS:
            weighted = own.map(lambda t, delta: delta.scaled(inputs.weights[t]))
            return self._linear(found).merge(weighted, inputs, None)
        if self.merge_method in _NATIVE:
            return self._native(found, place).merge(own, inputs, None)
        return self._special(own, inputs, found, place)

    def _special(
        self, deltas: Deltas, tensor: TensorContext, found: Resolved, place: _MergeContext
    ) -> Delta:
        """Merge by one of the methods that only this package implements."""
        shared = found.shared
        match self.merge_method:
            case "multislerp":
                normalize, eps = shared["normalize_weights"], shared["eps"]
                of_weights = self._is_of_weights(place)
                return multislerp(
                    deltas, tensor, of_weights=of_weights, normalize=normalize, eps=eps
                )
            case "nearswap":
                return nearswap(next(iter(deltas)), shared["t"])
            case "arcee_fusion":
                return arcee_fusion(next(iter(deltas)), tensor)
            case _:
                return ram(dict(deltas.items()), **shared)

    def _inputs(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Return the models in mergekit's sense, the base last if it is one of them."""
        return (*tasks, BASE) if self.with_base else tuple(tasks)

    def _place(self, tensor: TensorContext) -> _MergeContext | None:
        """Return the models of a tensor; None if no slice or part contains it."""
        own = [(k, each) for k, each in enumerate(self.slices) if is_of(each.part, tensor.name)]
        if not self.slices:
            return _MergeContext(None, self._inputs(tensor.tasks), tensor)
        if not own:
            return None
        if own[0][1].layers is None:
            number, whole = own[0]
            return _MergeContext(number, whole.models, tensor)
        if tensor.layer is None:
            number, outside = own[0 if is_before_layers(tensor.name) else -1]
            return _MergeContext(number, outside.models, tensor)
        index = tensor.layer[0]
        for number, each in own:
            assert each.layers is not None, "the other slices of the part have layers"
            if index < each.layers:
                local = dataclasses.replace(tensor, layer=(index, each.layers))
                return _MergeContext(number, each.models, local)
            index -= each.layers
        raise AssertionError(f"{tensor.name} is beyond the slices, which were checked.")

    def _resolved(self, place: _MergeContext) -> Resolved:
        return resolve(
            self.merge_method, self.settings, place.models, place.tensor, place.slice_number
        )

    def _linear(self, found: Resolved) -> Linear:
        """Return the weighted sum; passthrough is a sum of one model with its scale."""
        return Linear(normalize=found.shared.get("normalize", False))

    def _is_of_weights(self, place: _MergeContext) -> bool:
        return self.of_weights or BASE in place.models

    def _native(self, found: Resolved, place: _MergeContext) -> Merge:
        """Return starmerge's method of the same name, with its parameters for one tensor."""
        shared = found.shared
        match self.merge_method:
            case "slerp":
                return Slerp(t=shared["t"])
            case "nuslerp":
                along: Literal["tensor", "rows", "columns"] = "rows"
                if shared["nuslerp_flatten"]:
                    along = "tensor"
                elif shared["nuslerp_row_wise"]:
                    along = "columns"
                of_weights = self._is_of_weights(place)
                return NuSlerp(of="weights" if of_weights else "task_vectors", along=along)
            case "karcher":
                return Karcher(max_iter=shared["max_iter"], tol=shared["tol"])
            case "model_stock":
                return ModelStock(filter_wise=shared["filter_wise"])
            case _:
                return Sce(select_topk=shared["select_topk"])

    def _arithmetic(self, deltas: Deltas, tensor: TensorContext, found: Resolved) -> Delta:
        held = dict(deltas.items())
        shape = next(iter(held.values())).shape
        weights = [own["weight"] for own in found.own]
        masks = {t: self._mask(delta, t, tensor, found) for t, delta in held.items()}
        factors = {
            t: l1_factor(held[t].entries(), mask) if found.shared["rescale"] else 1.0
            for t, mask in masks.items()
            if mask is not None
        }

        def thinned(t: int, rows: slice) -> Tensor:
            entries, mask = held[t].entries(rows).double(), masks[t]
            return entries if mask is None else torch.where(mask[rows], factors[t] * entries, 0.0)

        merged = torch.empty(shape, dtype=torch.float32)
        for rows in panels(shape, len(held)):
            merged[rows] = merge_sparsified(
                torch.stack([thinned(t, rows) for t in held]),
                [weights[t] for t in held],
                total_weight=sum(weights),
                consensus=FAMILY[self.merge_method].consensus,
                normalize=found.shared["normalize"],
                lambda_=found.shared["lambda"],
            ).float()
        return Dense(merged)

    def _mask(
        self, delta: Delta, task: int, tensor: TensorContext, found: Resolved
    ) -> Tensor | None:
        """Return the mask of kept entries of a task vector, (m, n) bool; None: all."""
        own = found.own[task]
        density = own.get("density", 1.0)
        if density == 1 or 0 in delta.shape:
            return None
        if density == 0:
            return torch.zeros(delta.shape, dtype=torch.bool)
        entries = delta.entries()
        match FAMILY[self.merge_method].thinning:
            case "magnitude":
                return magnitude_mask(entries, density)
            case "outliers":
                return outlier_mask(entries, density, own["gamma"])
            case "ranked":
                rows = entries.reshape(as_rows(tensor))
                dropped = 1 - keep_probabilities(rows, density, own["epsilon"]).flatten()
            case _:
                dropped = torch.tensor(1 - density, dtype=torch.float64)
        drawn = kept(dropped, self.seed, tensor.tasks[task], tensor.name, entries.numel())
        return drawn.view(delta.shape)


def _nothing(tensor: TensorContext) -> LowRank:
    """Return an update of rank 0."""
    m, n = matrix_shape(tensor.shape)
    return LowRank(torch.zeros(m, 0, dtype=torch.float32), torch.zeros(0, n, dtype=torch.float32))
