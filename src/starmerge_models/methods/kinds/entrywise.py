"""What the merges have in common that look at each entry by itself."""

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
"""Entries of all tasks together that are merged at once, at most."""
_ENTRIES_OF_ONE = 2**16
"""And of each task: 256 KiB of float32, which stay in a processor's cache while they are used."""
_LEAST_SAMPLE = 64


class EntrywiseMerge(Merge):
    """A merge of which each entry depends on the same entry of the task vectors alone.

    It sees panels of some rows, the float32 entries of the task vectors, and sums in float64.
    Adapters and differences of stored tensors never become whole matrices.
    """

    def memory(self, tensor: TensorShape) -> int:
        """Tell the bytes needed; see :meth:`Method.memory`."""
        # The panels of all tasks, and the float32 result.
        return tensor.held + panel_bytes(tensor) + 4 * tensor.size

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Tell what is made; see :meth:`Merge.result`."""
        return dense_shape(tensor)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        held = dict(deltas.items())
        local = self.look(held, tensor, survey)
        first = next(iter(held.values()))
        merged = torch.empty(first.shape, dtype=torch.float32)
        for rows in panels(first.shape, len(held)):
            tau = [delta.entries(rows) for delta in held.values()]
            merged[rows] = self.merge_entries(tau, tuple(held), tensor, local)
        return Dense(merged)

    def look(self, deltas: dict[int, Delta], tensor: TensorContext, survey: Any) -> Any:
        """Find out what must be known of the whole tensor; by default what the survey found.

        Args:
            deltas: By task, w_t · τ_t.
            tensor: The tensor.
            survey: What :meth:`survey` found.
        """
        return survey

    @abstractmethod
    def merge_entries(
        self, tau: list[Tensor], tasks: tuple[int, ...], tensor: TensorContext, local: Any
    ) -> Tensor:
        """Merge some entries.

        Args:
            tau: (rows, n) float32 each, w_t · τ_t of the T' ≤ T tasks that change the tensor. They
                may be views of what is stored: not to be changed.
            tasks: (T',) their numbers t.
            tensor: The tensor.
            local: What :meth:`look` found.

        Returns:
            The merged entries, (rows, n), float64 or exact in float32.
        """


def stacked(deltas: Iterable[Delta], rows: slice) -> Tensor:
    """Return some rows of several deltas, (T', rows, n) float64."""
    return torch.stack([delta.entries(rows) for delta in deltas]).double()


def absolute_sum(entries: Tensor) -> float:
    """Return Σ|x|, in float64; NumPy adds in an order that no number of threads changes."""
    return float(np.abs(entries.numpy()).sum(dtype=np.float64))


def task_sum(tau: Iterable[Tensor]) -> Tensor:
    """Sum the entries of the tasks in float64, in the tasks' order."""
    first, *others = tau
    whole = first.to(torch.float64, copy=True)
    for tau_t in others:
        whole += tau_t
    return whole


def panels(shape: tuple[int, int], tasks: int = 1, step: int = 1) -> Iterator[slice]:
    """Yield slices of rows, each of few entries, or of one row.

    Args:
        shape: (m, n) of the matrix that they cover.
        tasks: How many tasks there are.
        step: Every how many rows are taken.
    """
    entries = min(_ENTRIES_OF_ONE, PANEL_ENTRIES // max(1, tasks))
    stride = step * max(1, entries // max(1, shape[1]))
    for start in range(0, shape[0], stride):
        yield slice(start, start + stride, step)


def panel_bytes(tensor: TensorShape, count: int | None = None, *, numbers: int = 10) -> int:
    """Return the bytes of the panels of rows that are in work at a time.

    Factors become float64 each time that some of their rows are looked at, A as a whole.

    Args:
        tensor: The tensor.
        count: How many deltas are looked at side by side, in float32; by default those of all
            tasks that change the tensor.
        numbers: How many float64 numbers are made of each entry, at most.
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
        step: Every how many rows are taken; all, if these would be fewer than 64.
    """
    taken = step if delta.shape[0] >= _LEAST_SAMPLE * step else 1
    for rows in panels(delta.shape, step=taken):
        yield delta.entries(rows)
