"""Trimming: only the largest entries of each task vector stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge.deltas import Delta, Dense
from starmerge.methods.entrywise import panels
from starmerge.methods.method import Deltas, TensorContext, Transform, Walk, method
from starmerge.selection import BUCKETS, histogram, kth_largest, locate, magnitude, share_of
from starmerge.spectral import Truncation

Scope = Annotated[
    Literal["global", "local"],
    Field(description="whether the largest of the whole model stay, or of each tensor"),
]
Percent = Annotated[
    float, Field(gt=0, le=100, description="share of the entries to keep, in percent")
]


@method("trim")
class Trim(Transform):
    """Keep the k % of each task vector's entries with the largest magnitudes, drop the rest.

    An entry stays if its magnitude is at least the ⌈k %⌉-th largest; all that equal it stay. What
    counts are all entries of the merged tensors, also those that the task leaves alone.

    Source: the first step of TIES, arXiv 2306.01708. Its repository keeps one entry more.
    Cost: two more passes over the model for the exact global threshold; the result is dense.
    When to use: before another merge, as in ``trim+average``.
    """

    k: Percent = 20.0
    scope: Scope = "global"

    makes_dense = True

    def survey(self, walk: Walk) -> Any:
        """Find the thresholds of all tasks; see :meth:`Transform.survey`."""
        return global_thresholds(walk, self.k) if self.scope == "global" else None

    def apply(
        self, delta: Delta, task: int, tensor: TensorContext, survey: Any
    ) -> tuple[Delta, Truncation | None]:
        """Trim one delta; see :meth:`Transform.apply`."""
        threshold = local_threshold(delta, self.k) if survey is None else survey[task]
        entries = delta.entries()
        return Dense(torch.where(entries.abs() >= threshold, entries, 0.0)), None


def global_thresholds(walk: Walk, k: float) -> list[float]:
    """Return the magnitude of the ⌈k %⌉-th largest entry of each task's whole task vector.

    Goes through the model twice.
    """

    def count(deltas: Deltas, tensor: TensorContext) -> tuple[int, int, dict[int, Tensor]]:
        counts, size = {}, 0
        for task, delta in deltas.items():
            size = delta.shape[0] * delta.shape[1]
            counts[task] = _counts(delta, None)
        return len(tensor.tasks), size, counts

    size, sums = 0, list[Tensor]()
    for tasks, own_size, counts in walk(count):
        sums = sums or _empty(tasks)
        size += own_size
        for task, own in counts.items():
            sums[task] += own
    found = [locate(counts, share_of(size, k)) for counts in sums]

    def refine(deltas: Deltas, tensor: TensorContext) -> dict[int, Tensor]:
        return {task: _counts(delta, found[task][0]) for task, delta in deltas.items()}

    sums = _empty(len(sums))
    for counts in walk(refine):
        for task, own in counts.items():
            sums[task] += own
    return [
        magnitude(upper, locate(counts, left)[0])
        for (upper, left), counts in zip(found, sums, strict=True)
    ]


def local_threshold(delta: Delta, k: float) -> float:
    """Return the magnitude of the ⌈k %⌉-th largest entry of one delta."""
    parts = [delta.entries(rows) for rows in panels(delta.shape)]
    return kth_largest(lambda: parts, share_of(delta.shape[0] * delta.shape[1], k))


def thresholds(deltas: dict[int, Delta], k: float, survey: Sequence[float] | None) -> Tensor:
    """Return the thresholds of some tasks for one tensor, (T', 1, 1) float64.

    Args:
        deltas: The tensor's deltas by task.
        k: Share to keep, in percent.
        survey: The global thresholds; None for local ones.
    """
    values = [
        local_threshold(delta, k) if survey is None else survey[task]
        for task, delta in deltas.items()
    ]
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def _counts(delta: Delta, bucket: int | None) -> Tensor:
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    for rows in panels(delta.shape):
        counts += histogram(delta.entries(rows), bucket)
    return counts


def _empty(tasks: int) -> list[Tensor]:
    return [torch.zeros(BUCKETS, dtype=torch.int64) for _ in range(tasks)]
