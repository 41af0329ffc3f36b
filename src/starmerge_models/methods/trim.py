"""Trimming: keep only the largest entries of each task vector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta, Dense
from starmerge_models.methods.kinds.entrywise import entries_of, panel_bytes, panels
from starmerge_models.methods.memory import DeltaShape, TensorShape, dense_shape
from starmerge_models.methods.method import Deltas, TensorContext, Transform, Walk, method
from starmerge_models.selection import SAMPLE, Tally, bracket, histogram, kth_largest, share_of
from starmerge_models.spectral import Truncation
from starmerge_models.spectral.core_space import FLOAT64_NOISE

Scope = Annotated[
    Literal["global", "local"],
    Field(description="whether the largest entries of the whole model or of each tensor are kept"),
]
Percent = Annotated[
    float, Field(gt=0, le=100, description="share of the entries to keep, in percent")
]


@method("trim")
class Trim(Transform):
    """Keep the k % of each task vector's entries with the largest magnitudes, drop the rest.

    An entry is kept if its magnitude is at least the ⌈k %⌉-th largest, so ties with it are all
    kept. The percentage refers to all entries of the merged tensors, including tensors that the
    task does not change.

    Source: the first step of TIES, arXiv 2306.01708. Its repository keeps one entry more.
    Cost: two more passes over the model for the exact global threshold, one of them over every
    17th row; the result is dense.
    When to use: before another merge, as in ``trim+average``.
    """

    k: Percent = 20.0
    scope: Scope = "global"

    @property
    def passes(self) -> int:
        """See :attr:`Method.passes`."""
        return PASSES if self.scope == "global" else 0

    def survey(self, walk: Walk) -> Any:
        """Find the thresholds of all tasks; see :meth:`Transform.survey`."""
        return global_thresholds(walk, self.k) if self.scope == "global" else None

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        return 4 * tensor.size + panel_bytes(tensor, 1, numbers=6)

    def result(self, delta: DeltaShape, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Transform.result`."""
        return dense_shape(tensor)

    def apply(
        self, delta: Delta, task: int, tensor: TensorContext, survey: Any
    ) -> tuple[Delta, Truncation | None]:
        """Trim one delta; see :meth:`Transform.apply`."""
        threshold = local_threshold(delta, self.k) if survey is None else survey[task]
        left = torch.empty(delta.shape, dtype=torch.float32)
        for rows in panels(delta.shape):
            left[rows] = trimmed(delta.entries(rows), threshold)
        return Dense(left), None


def trimmed(entries: Tensor, threshold: float) -> Tensor:
    """Return entries with those of magnitudes below a threshold set to zero, float32.

    Args:
        entries: float32.
        threshold: A float32 number. With 0 the entries themselves are returned.
    """
    if threshold == 0:
        return entries
    # hardshrink zeroes magnitudes ≤ its argument, so pass the next smaller float32 number.
    below = np.nextafter(np.float32(threshold), np.float32(0))
    return torch.hardshrink(entries, float(below))


def largest_entries(matrix: Tensor, count: int, noise: float) -> Tensor:
    """Return a matrix of computed coordinates with all but its largest entries set to zero.

    Args:
        matrix: float64.
        count: Number of entries to keep. Entries that equal the last of them up to the rounding of
            float64 are kept too.
        noise: Magnitude that the rounding of the task vectors can give to a zero, as a share of the
            norm. Entries up to this magnitude are set to zero.
    """
    if not matrix.numel():
        return matrix
    magnitudes, norm = matrix.abs(), torch.linalg.vector_norm(matrix)
    last = magnitudes.flatten().kthvalue(max(1, matrix.numel() - count + 1)).values
    large = (magnitudes >= last - FLOAT64_NOISE * norm) & (magnitudes > noise * norm)
    return torch.where(large, matrix, 0.0)


PASSES = 2
"""Passes over the model that :func:`global_thresholds` makes, unless it must repeat them."""


def global_thresholds(walk: Walk, k: float) -> list[float]:
    """Return the magnitude of the ⌈k %⌉-th largest entry of each task's whole task vector.

    Takes two passes over the model: one over a sample of the rows, which brackets the thresholds,
    and one over all rows. If the sample's bracket misses a threshold, which is rare, both passes
    are repeated over all rows.
    """
    for step in (SAMPLE, 1):
        kth, between = _brackets(walk, k, step)
        found = _between(walk, kth, between)
        if None not in found:
            break
    return cast("list[float]", found)


def local_threshold(delta: Delta, k: float) -> float:
    """Return the magnitude of the ⌈k %⌉-th largest entry of one delta."""
    size = delta.shape[0] * delta.shape[1]
    return kth_largest(partial(entries_of, delta), size, share_of(size, k))


def thresholds(
    deltas: dict[int, Delta], k: float, survey: Sequence[float] | None
) -> dict[int, float]:
    """Return the thresholds of some tasks for one tensor, by task.

    Args:
        deltas: The tensor's deltas by task.
        k: Share to keep, in percent.
        survey: The global thresholds; None for local ones.
    """
    return {
        task: local_threshold(delta, k) if survey is None else survey[task]
        for task, delta in deltas.items()
    }


def _brackets(walk: Walk, k: float, step: int) -> tuple[int, list[range]]:
    """Return ⌈k %⌉ of the model's entries, and each task's range of bits that holds its entry."""

    def visit(
        deltas: Deltas, tensor: TensorContext
    ) -> tuple[int, int, dict[int, npt.NDArray[np.float64]]]:
        counts, size = {}, 0
        for task, delta in deltas.items():
            size = delta.shape[0] * delta.shape[1]
            counts[task] = histogram(entries_of(delta, step), size)
        return len(tensor.tasks), size, counts

    whole, sums = 0, dict[int, npt.NDArray[np.float64]]()
    for tasks, size, counts in walk(visit):
        whole += size
        sums = sums or {task: histogram([], 0) for task in range(tasks)}
        for task, own in counts.items():
            sums[task] += own
    kth = share_of(whole, k)
    return kth, [bracket(counts, kth, step) for counts in sums.values()]


def _between(walk: Walk, kth: int, between: list[range]) -> list[float | None]:
    """Return each task's kth largest magnitude; None if it lies outside the task's range."""

    def visit(deltas: Deltas, tensor: TensorContext) -> dict[int, Tally]:
        tallies = {}
        for task, delta in deltas.items():
            tallies[task] = Tally(between[task])
            for entries in entries_of(delta):
                tallies[task].add(entries)
        return tallies

    sums = [Tally(bits) for bits in between]
    for tallies in walk(visit):
        for task, own in tallies.items():
            sums[task].merge(own)
    return [tally.kth_largest(kth) for tally in sums]
