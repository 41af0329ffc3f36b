"""Simple averaging."""

from __future__ import annotations

from typing import Any

from starmerge_models.deltas import Delta, total
from starmerge_models.methods.memory import TensorShape, total_bytes
from starmerge_models.methods.method import Deltas, Merge, TensorContext, method


@method("average")
class Average(Merge):
    """The mean of the fine-tunes: base + Σ w_t δ_t / Σ w_t.

    Source: model soups, arXiv 2203.05482, the uniform soup, written with deltas.
    Cost: one addition per tensor and task.
    When to use: two or three close models; as the baseline for other methods.
    """

    averages = True

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        return total_bytes(tensor)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        return total(deltas).scaled(1 / tensor.total_weight)
