"""mergekit's merge methods, with the settings that its recipes give tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from starmerge.deltas import Delta, Dense
from starmerge.errors import UsageError
from starmerge.mergekit.family import FAMILY, agree, magnitude_mask, outlier_mask
from starmerge.mergekit.settings import BASE, Resolved, Setting, read_settings, resolve
from starmerge.methods.dare import kept
from starmerge.methods.della import as_rows, check_chances
from starmerge.methods.karcher import Karcher
from starmerge.methods.kinds.combination import combine_bytes
from starmerge.methods.kinds.entrywise import panel_bytes, panels
from starmerge.methods.kinds.masks import chances_by_rank, l1_factor
from starmerge.methods.linear import Linear
from starmerge.methods.memory import DeltaShape, TensorShape, dense_shape
from starmerge.methods.method import Deltas, Merge, TensorContext, method, refuse_weights
from starmerge.methods.model_stock import ModelStock
from starmerge.methods.nuslerp import NuSlerp
from starmerge.methods.sce import Sce
from starmerge.methods.slerp import Slerp


@method("mergekit")
class Mergekit(Merge):
    """A merge method of mergekit, with settings that may differ between tensors.

    What a recipe for mergekit is translated into: ``starmerge merge recipe.yaml`` does it. Of the
    ``settings`` the first counts that is for the parameter, the model and the tensor: ``filter`` is
    a part of the tensor's name, and a list of values is spread over the layers.

    linear, slerp, nuslerp, karcher, model_stock and sce are the methods of these names. The
    others are mergekit's own task arithmetic: x_i = w_i δ_i, with δ_i what thinning leaves of
    W_i − W_0; then λ Σ x_i, over the entries with the elected sign in ties, dare_ties,
    breadcrumbs_ties and della; divided by Σ w_i if normalised. Random draws are those of ``dare``
    and ``della``, by seed, model, tensor and place.

    Source: mergekit 0.1.5, arXiv 2403.13257, github.com/arcee-ai/mergekit. Different from there:
    everything is computed in float64 and rounded once; of equal magnitudes at a cut the first stay.
    Cost: as for the methods; the task-arithmetic family holds the entries of all tasks at once.
    When to use: a recipe that exists for mergekit.
    """

    merge_method: Annotated[
        Literal[
            "linear",
            "slerp",
            "nuslerp",
            "karcher",
            "model_stock",
            "sce",
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
        Field(description="parameter, value, and for which model and filter; the first counts"),
    ] = ()
    with_base: Annotated[
        bool, Field(description="whether the base is one of the models: in settings, model: base")
    ] = False
    layers: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="how many layers the model must have"),
    ] = None
    seed: Annotated[int, Field(ge=0, description="seed of what is dropped")] = 0

    scaled_inputs = False

    @field_validator("settings")
    @classmethod
    def _read(cls, settings: tuple[Setting, ...], info: ValidationInfo) -> tuple[Setting, ...]:
        if "merge_method" not in info.data:
            return settings
        return read_settings(info.data["merge_method"], settings)

    def parameters(self) -> dict[str, Any]:
        """Return the parameters by name, as plain data."""
        settings = [setting.model_dump(exclude_none=True) for setting in self.settings]
        return super().parameters() | {"settings": settings}

    @property
    def needs_base(self) -> bool:
        """Yes, where the method works on the weights, and for the layers that settings go by."""
        return True

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Compare the settings with the models; see :meth:`Method.check`."""
        refuse_weights(self, tasks, weights, "its weights stand in its settings")
        if BASE in tasks:
            raise UsageError(f"mergekit: {BASE!r} is the base's name. Give the model another one.")
        inputs = self._inputs(tasks)
        for setting in self.settings:
            if setting.model not in (None, *inputs):
                raise UsageError(
                    f"mergekit: the setting of {setting.parameter!r} is for {setting.model!r}, "
                    f"which is none of the models: {', '.join(inputs)}."
                )
        counted = {"slerp": Slerp(), "nuslerp": NuSlerp(), "model_stock": ModelStock()}
        if self.merge_method in counted:
            counted[self.merge_method].check(inputs, (1.0,) * len(inputs), tensors)

    def check_tensors(self, merged: Sequence[TensorContext], left: Sequence[TensorContext]) -> None:
        """Resolve the settings of all tensors; see :meth:`Method.check_tensors`."""
        counts = {tensor.layer[1] for tensor in (*merged, *left) if tensor.layer is not None}
        if self.layers is not None and self.layers not in counts:
            raise UsageError(
                f"mergekit: the recipe is for all of {self.layers} layers, and the base has "
                f"{' or '.join(map(str, sorted(counts))) or 'none'}. Only whole models are merged."
            )
        for tensor in merged:
            found = self._resolved(tensor)
            for own in found.own:
                if "epsilon" in own:
                    check_chances(own["density"], own["epsilon"])
            if self.merge_method == "linear":
                self._linear(found).check_tensors([self._as_inputs(tensor, found)], [])
        if self.merge_method == "linear":
            for tensor in left:
                found = self._resolved(tensor)
                self._linear(found).check_tensors([], [self._as_inputs(tensor, found)])

    def memory(self, tensor: TensorShape) -> int:
        """Tell the bytes needed; see :meth:`Method.memory`."""
        if self.merge_method == "linear":
            return tensor.held + Linear(normalize=False).memory(tensor)
        if self.merge_method == "sce":
            return Sce(select_topk=0.5).memory(tensor)
        if self.merge_method not in FAMILY:
            return combine_bytes(tensor, "columns", with_base=True)
        # A mask for each task. While one is made: all entries, in float64 first where they have
        # factors, and what ranks and draws them, fifty bytes an entry at most.
        thinning = 0 if FAMILY[self.merge_method].thinning == "none" else 50 * tensor.size
        masks = len(tensor.deltas) * tensor.size
        panels = panel_bytes(tensor, numbers=6 * len(tensor.deltas))
        return tensor.held + masks + max(thinning, panels + 4 * tensor.size)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Tell what is made; see :meth:`Merge.result`."""
        return dense_shape(tensor)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        found = self._resolved(tensor)
        if self.merge_method in FAMILY:
            return self._arithmetic(deltas, tensor, found)
        inputs = self._as_inputs(tensor, found)
        if self.merge_method == "linear":
            weighted = deltas.map(lambda t, delta: delta.scaled(inputs.weights[t]))
            return self._linear(found).merge(weighted, inputs, None)
        return self._native(found).merge(deltas, inputs, None)

    def _inputs(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Return the models in mergekit's sense: the base is the last, if it is one."""
        return (*tasks, BASE) if self.with_base else tuple(tasks)

    def _resolved(self, tensor: TensorContext) -> Resolved:
        return resolve(self.merge_method, self.settings, self._inputs(tensor.tasks), tensor)

    def _as_inputs(self, tensor: TensorContext, found: Resolved) -> TensorContext:
        """Return the tensor with the models in mergekit's sense: the base has a delta of zero."""
        weights = tuple(own.get("weight", 1.0) for own in found.own)
        return dataclasses.replace(tensor, tasks=self._inputs(tensor.tasks), weights=weights)

    def _linear(self, found: Resolved) -> Linear:
        return Linear(normalize=found.shared["normalize"])

    def _native(self, found: Resolved) -> Merge:
        """Return the method of the same name, with its parameters for one tensor."""
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
                return NuSlerp(of="weights" if self.with_base else "task_vectors", along=along)
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
            merged[rows] = agree(
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
        """Return which entries of a task vector stay, (m, n) bool; None for all."""
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
                dropped = 1 - chances_by_rank(rows, density, own["epsilon"]).flatten()
            case _:
                dropped = torch.tensor(1 - density, dtype=torch.float64)
        drawn = kept(dropped, self.seed, tensor.tasks[task], tensor.name, entries.numel())
        return drawn.view(delta.shape)
