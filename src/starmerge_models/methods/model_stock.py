"""Model Stock: scale the average by a factor computed from the angles between fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta
from starmerge_models.errors import UsageError
from starmerge_models.methods.kinds.combination import (
    Along,
    combine,
    combine_bytes,
    combined_shape,
    deltas_of_all_tasks,
    gram_norms,
)
from starmerge_models.methods.memory import DeltaShape, TensorShape
from starmerge_models.methods.method import Deltas, Merge, TensorContext, method, refuse_weights

_SMALLEST = 1e-6
"""For a denominator of t smaller than this, t is 0."""


@method("model_stock")
class ModelStock(Merge):
    """Scale the mean of the task vectors by a factor that their angles determine.

    The update is t · Σ τ_t / T with t = T c / (1 + (T − 1) c), c the mean of cos(τ_i, τ_j) over
    all pairs: for equal task vectors t = 1, for orthogonal ones t = 0, which is the base. Opposed
    task vectors may give t < 0 or t > 1. A task that does not change the tensor has the cosine 0.

    Source: arXiv 2403.19522, eq. 3; mergekit's model_stock. As in mergekit, ‖τ_i‖‖τ_j‖ is at least
    ``floor``, so that tiny updates count as unrelated; the paper has no floor (0).
    Cost: inner products of all pairs; adapters stay low-rank without ``filter_wise``.
    When to use: several fine-tunes for the same task, from other seeds or settings.
    """

    filter_wise: Annotated[
        bool, Field(description="whether to compute t for each row instead of the whole tensor")
    ] = False
    floor: Annotated[
        float, Field(ge=0, description="lower bound of the product of two norms in a cosine")
    ] = 1e-6

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse weights and a single model; see :meth:`Method.check`."""
        if len(tasks) < 2:
            raise UsageError("model_stock: it compares models with each other. Give at least two.")
        refuse_weights(self, tasks, weights, "all models count alike")

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        return combine_bytes(tensor, "rows" if self.filter_wise else "tensor", with_base=False)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Merge.result`."""
        return combined_shape(tensor, "rows" if self.filter_wise else "tensor", with_base=False)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        along: Along = "rows" if self.filter_wise else "tensor"
        return combine(deltas_of_all_tasks(deltas, tensor), self._coefficients, tensor, along)

    def _coefficients(self, G: Tensor) -> Tensor:
        count = G.shape[-1]
        norms = gram_norms(G)
        products = (norms[..., :, None] * norms[..., None, :]).clamp(min=self.floor)
        cosines = (G / torch.where(products == 0, 1.0, products)).clamp(-1, 1)
        i, j = torch.triu_indices(count, count, offset=1)
        c = cosines[..., i, j].mean(-1)
        denominator = 1 + (count - 1) * c
        flat = denominator.abs() < _SMALLEST
        t = torch.where(flat, 0.0, count * c / torch.where(flat, 1.0, denominator))
        return (t / count)[..., None].expand(*t.shape, count)
