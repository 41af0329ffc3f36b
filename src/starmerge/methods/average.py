"""Simple averaging."""

from __future__ import annotations

from collections.abc import Iterable

from starmerge.deltas import Delta, total
from starmerge.methods.method import Merged, Method, TensorContext, method


@method("average")
class Average(Method):
    """The mean of the fine-tunes: base + Σ δ_t / T.

    Source: model soups, arXiv 2203.05482, the uniform soup, written with deltas.
    Cost: one addition a tensor and task.
    When to use: two or three close models; as the line that other methods must beat.
    """

    def merge(self, deltas: Iterable[Delta], context: TensorContext) -> Merged:
        """Merge one tensor; see :meth:`Method.merge`."""
        return Merged(total(deltas).scaled(1 / context.tasks))
