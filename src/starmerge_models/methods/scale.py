"""Scaling of the merged update by a constant factor."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from starmerge_models.deltas import Delta
from starmerge_models.methods.memory import TensorShape, scaled_shape
from starmerge_models.methods.method import Deltas, PostStep, TensorContext, method


@method("scale")
class Scale(PostStep):
    """Multiply the merged update by one factor.

    Source: the scaling coefficient of arXiv 2212.04089, for any merge of task vectors.
    Cost: none.
    When to use: to strengthen or weaken a merge; ``own_response`` computes a factor by itself.
    """

    factor: Annotated[float, Field(description="the factor of the update")] = 1.0

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        return scaled_shape(tensor).nbytes

    def apply(self, merged: Delta, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Scale one tensor; see :meth:`PostStep.apply`."""
        return merged.scaled(self.factor)
