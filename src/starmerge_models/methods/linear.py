"""The weighted mean, or the weighted sum, of the weights themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from starmerge_models.deltas import Delta, Dense, total
from starmerge_models.errors import UsageError
from starmerge_models.methods.kinds.combination import base_weight
from starmerge_models.methods.kinds.entrywise import panels
from starmerge_models.methods.memory import (
    DeltaShape,
    TensorShape,
    dense_shape,
    total_bytes,
    total_shape,
)
from starmerge_models.methods.method import Deltas, Merge, TensorContext, method, sums_to_zero


@method("linear")
class Linear(Merge):
    """The weighted mean of the models, Σ w_t W_t / Σ w_t, including the base if it has a weight.

    With ``base_weight`` 0 this is ``average``. Without ``normalize`` it is Σ w_t W_t, which changes
    the scale of the weights unless their factors sum to 1.

    Source: model soups, arXiv 2203.05482; mergekit's linear.
    Cost: one addition per tensor and task.
    When to use: close models, or checkpoints of one run, when the base counts as one of them.
    """

    normalize: Annotated[bool, Field(description="whether to divide by the sum of the weights")] = (
        True
    )
    base_weight: Annotated[float, Field(description="the base's weight, as one of the models")] = (
        0.0
    )

    @property
    def needs_base(self) -> bool:
        """Whether the sum of weights is used, which is not near the base."""
        return not self.normalize

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse weights that sum to zero; see :meth:`Method.check`."""
        self._check_sum(weights)

    def check_tensors(self, merged: Sequence[TensorContext], left: Sequence[TensorContext]) -> None:
        """Refuse sums in which unmerged tensors change; see :meth:`Method.check_tensors`."""
        for tensor in merged:
            self._check_sum(tensor.weights)
        for tensor in left:
            if not self.normalize and tensor.total_weight + self.base_weight != 1:
                raise UsageError(
                    f"linear: no model changes {tensor.name}, which a sum of weights with "
                    f"Σw = {tensor.total_weight + self.base_weight:g} would scale. Normalise, or "
                    "choose weights that sum to 1."
                )

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        # The sum, and the result if the base is added to it in panels.
        return total_bytes(tensor) + (4 * tensor.size if self.needs_base else 0)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Merge.result`."""
        return dense_shape(tensor) if self.needs_base else total_shape(tensor)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        mass = tensor.total_weight + self.base_weight
        summed = total(deltas)
        if self.normalize:
            return summed.scaled(1 / mass)
        if mass == 1:
            return summed
        base = base_weight(tensor)
        merged = torch.empty(base.shape, dtype=torch.float32)
        for rows in panels(base.shape):
            exact = summed.entries(rows).double() + (mass - 1) * base.entries(rows).double()
            merged[rows] = exact.float()
        return Dense(merged)

    def _check_sum(self, weights: Sequence[float]) -> None:
        if self.normalize and sums_to_zero([*weights, self.base_weight]):
            raise UsageError(
                "linear: the weights sum to zero, and linear divides by their sum. Change one, or "
                "set normalize to false."
            )
