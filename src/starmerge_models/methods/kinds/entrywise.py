"""Base class and helpers of merges that work entry by entry."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense
from starmerge_models.methods.memory import DeltaShape, TensorShape, dense_shape
from starmerge_models.methods.method import Deltas, Merge, TensorContext

PANEL_ENTRIES = 2**20
"""Most entries in one panel, summed over all tasks."""
_ENTRIES_OF_ONE = 2**16
"""Most entries of each task in one panel: 256 KiB of float32, which fit into the CPU's cache."""
_LEAST_SAMPLE = 64


class EntrywiseMerge(Merge):
    """A merge in which each entry of the result depends on the same entry of the task vectors.

    It processes panels of some rows, with float32 entries of the task vectors, and sums in float64.
    Adapters and lazy differences of stored tensors are never expanded to whole matrices.
    """

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        # The panels of all tasks, and the float32 result.
        return tensor.deltas_nbytes + panel_bytes(tensor) + 4 * tensor.size

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Merge.result`."""
        return dense_shape(tensor)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        held = dict(deltas.items())
        local = self.prepare_tensor(held, tensor, survey)
        first = next(iter(held.values()))
        merged = torch.empty(first.shape, dtype=torch.float32)
        for rows in panels(first.shape, len(held)):
            tau = [delta.entries(rows) for delta in held.values()]
            merged[rows] = self.merge_entries(tau, tuple(held), tensor, local)
        return Dense(merged)

    def prepare_tensor(self, deltas: dict[int, Delta], tensor: TensorContext, survey: Any) -> Any:
        """Compute statistics of the whole tensor; by default return ``survey``.

        Args:
            deltas: By task, w_t · τ_t.
            tensor: The tensor.
            survey: The result of :meth:`survey`.
        """
        return survey

    @abstractmethod
    def merge_entries(
        self, tau: list[Tensor], tasks: tuple[int, ...], tensor: TensorContext, local: Any
    ) -> Tensor:
        """Merge some entries.

        Args:
            tau: (rows, n) float32 each, w_t · τ_t of the T' ≤ T tasks that change the tensor. They
                may be views of stored data and must not be modified.
            tasks: (T',) their numbers t.
            tensor: The tensor.
            local: The result of :meth:`prepare_tensor`.

        Returns:
            The merged entries, (rows, n), float64 or exact in float32.
        """


def stacked(deltas: Iterable[Delta], rows: slice) -> Tensor:
    """Return some rows of several deltas, (T', rows, n) float64."""
    return torch.stack([delta.entries(rows) for delta in deltas]).double()


def absolute_sum(entries: Tensor) -> float:
    """Return Σ|x| in float64; NumPy's order of addition does not depend on the threads."""
    return float(np.abs(entries.numpy()).sum(dtype=np.float64))


def task_sum(tau: Iterable[Tensor]) -> Tensor:
    """Sum the entries of the tasks in float64, in the tasks' order."""
    first, *others = tau
    whole = first.to(torch.float64, copy=True)
    for tau_t in others:
        whole += tau_t
    return whole


def panels(shape: tuple[int, int], tasks: int = 1, step: int = 1) -> Iterator[slice]:
    """Yield slices of rows that cover a matrix, each of few entries, and of one row at least.

    Args:
        shape: (m, n) of the matrix.
        tasks: Number of tasks.
        step: Stride between the rows of a slice.
    """
    entries = min(_ENTRIES_OF_ONE, PANEL_ENTRIES // max(1, tasks))
    stride = step * max(1, entries // max(1, shape[1]))
    for start in range(0, shape[0], stride):
        yield slice(start, start + stride, step)


def panel_bytes(tensor: TensorShape, count: int | None = None, *, numbers: int = 10) -> int:
    """Return the bytes of the panels of rows that are in memory at the same time.

    Each panel of a low-rank delta converts its rows of B, and all of A, to float64.

    Args:
        tensor: The tensor.
        count: Number of deltas whose float32 panels are in memory together; by default those of all
            tasks that change the tensor.
        numbers: Upper bound of the float64 temporaries per entry.
    """
    m, n = tensor.matrix
    if count is None:
        count = len(tensor.deltas)
    rows = min(m, max(1, min(_ENTRIES_OF_ONE, PANEL_ENTRIES // max(1, count)) // max(1, n)))
    seen = [*tensor.deltas, *([] if tensor.merged is None else [tensor.merged])]
    factor = 8 * n * max(delta.rank or 0 for delta in seen)
    return (4 * count + 8 * numbers) * rows * n + factor


def entries_of(delta: Delta, step: int = 1) -> Iterator[Tensor]:
    """Yield the entries of a delta, float32, panel by panel.

    Args:
        delta: The delta.
        step: Stride between the rows; 1 is used instead if there would be fewer than 64 rows.
    """
    taken = step if delta.shape[0] >= _LEAST_SAMPLE * step else 1
    for rows in panels(delta.shape, step=taken):
        yield delta.entries(rows)
