"""Model Stock: how far to go from the base, told from the angle between the fine-tunes."""

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
    every_task,
    lengths,
)
from starmerge_models.methods.memory import DeltaShape, TensorShape
from starmerge_models.methods.method import Deltas, Merge, TensorContext, method, refuse_weights

_SMALLEST = 1e-6
"""Where the denominator of t is smaller, t is 0."""


@method("model_stock")
class ModelStock(Merge):
    """Scale the mean of the task vectors by what their angles say of the noise in them.

    The update is t · Σ τ_t / T with t = T c / (1 + (T − 1) c), c the mean of cos(τ_i, τ_j) over
    all pairs: task vectors that agree stay as they are, unrelated ones lead back to the base.
    Opposed ones may give t < 0 or t > 1. A task that leaves the tensor alone has the cosine 0.

    Source: arXiv 2403.19522, eq. 3; mergekit's model_stock. As there, ‖τ_i‖‖τ_j‖ is not taken
    below a ``floor``, so that tiny updates count as unrelated; the paper has none (0).
    Cost: inner products of all pairs; adapters stay low-rank without ``filter_wise``.
    When to use: several fine-tunes for the same task, from other seeds or settings.
    """

    filter_wise: Annotated[
        bool, Field(description="whether each row has a t of its own, not the whole tensor")
    ] = False
    floor: Annotated[
        float, Field(ge=0, description="least product of two norms that is divided by")
    ] = 1e-6

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse weights and a single model; see :meth:`Method.check`."""
        if len(tasks) < 2:
            raise UsageError("model_stock: it compares models with each other. Give at least two.")
        refuse_weights(self, tasks, weights, "all models count alike")

    def memory(self, tensor: TensorShape) -> int:
        """Tell the bytes needed; see :meth:`Method.memory`."""
        return combine_bytes(tensor, "rows" if self.filter_wise else "tensor", with_base=False)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Tell what is made; see :meth:`Merge.result`."""
        return combined_shape(tensor, "rows" if self.filter_wise else "tensor", with_base=False)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        along: Along = "rows" if self.filter_wise else "tensor"
        return combine(every_task(deltas, tensor), self._coefficients, tensor, along)

    def _coefficients(self, G: Tensor) -> Tensor:
        count = G.shape[-1]
        norms = lengths(G)
        products = (norms[..., :, None] * norms[..., None, :]).clamp(min=self.floor)
        cosines = (G / torch.where(products == 0, 1.0, products)).clamp(-1, 1)
        i, j = torch.triu_indices(count, count, offset=1)
        c = cosines[..., i, j].mean(-1)
        denominator = 1 + (count - 1) * c
        flat = denominator.abs() < _SMALLEST
        t = torch.where(flat, 0.0, count * c / torch.where(flat, 1.0, denominator))
        return (t / count)[..., None].expand(*t.shape, count)
