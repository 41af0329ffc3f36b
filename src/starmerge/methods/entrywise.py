"""What the merges have in common that look at each entry by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from starmerge.deltas import Delta, Dense
from starmerge.methods.method import Deltas, Merge, TensorContext

PANEL_ENTRIES = 2**21
"""Entries of all tasks together that are merged at once, in float64."""


class EntrywiseMerge(Merge):
    """A merge of which each entry depends on the same entry of the task vectors alone.

    It sees float64 panels of some rows, filled with the float32 entries of the task vectors, so
    that adapters are never blown up to whole matrices all at once.
    """

    holds_all: ClassVar[bool] = True
    makes_dense: ClassVar[bool] = True

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        held = dict(deltas.items())
        local = self.look(held, tensor, survey)
        first = next(iter(held.values()))
        merged = torch.empty(first.shape)
        for rows in panels(first.shape, len(held)):
            tau = stacked(held.values(), rows)
            merged[rows] = self.merge_entries(tau, tuple(held), tensor, local).float()
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
        self, tau: Tensor, tasks: tuple[int, ...], tensor: TensorContext, local: Any
    ) -> Tensor:
        """Merge some entries.

        Args:
            tau: (T', rows, n) float64, w_t · τ_t of the T' ≤ T tasks that change the tensor.
            tasks: (T',) their numbers t.
            tensor: The tensor.
            local: What :meth:`look` found.

        Returns:
            The merged entries, (rows, n) float64.
        """


def stacked(deltas: Iterable[Delta], rows: slice) -> Tensor:
    """Return some rows of several deltas, (T', rows, n) float64."""
    return torch.stack([delta.entries(rows) for delta in deltas]).double()


def absolute_sum(entries: Tensor) -> float:
    """Return Σ|x|, in float64; NumPy adds in an order that no number of threads changes."""
    return float(np.abs(entries.numpy()).sum(dtype=np.float64))


def task_sum(tau: Tensor) -> Tensor:
    """Sum over the first dimension, in its order: torch's own depends on the shape of the rest."""
    return reduce(torch.add, tau.unbind())


def panels(shape: tuple[int, int], tasks: int = 1) -> Iterator[slice]:
    """Yield slices of rows that cover a matrix, each of at most :data:`PANEL_ENTRIES` entries."""
    step = max(1, PANEL_ENTRIES // max(1, shape[1] * tasks))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)
