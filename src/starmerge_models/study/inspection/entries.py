"""What is seen of task vectors entry by entry: signs, magnitudes, and the rounding of a sum.

Methods such as TIES look at entries, so signs are compared there. Of a large tensor some of the
rows are looked at, evenly spread; sums over them are scaled up to the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank, Stored, matrix_shape
from starmerge_models.merging.fold import Fold, fold_bytes

MOST = 2**20
"""Entries of a tensor that are looked at, more or less; of one no larger, all are."""

_PANEL = 2**20
"""Entries of all tasks together that are in memory at once, or one row of each."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Of the tasks of one tensor; sums are scaled up to the whole tensor."""

    step: int
    """Every how manyth row was looked at; 1: all."""
    products: npt.NDArray[np.float64]
    """(T, T), Σ τ_i τ_j over entries."""
    magnitudes: npt.NDArray[np.float64]
    """(T, T), Σ |τ_i τ_j|."""
    sizes: npt.NDArray[np.float64]
    """(T,), Σ |τ_i|."""
    outvoted: npt.NDArray[np.float64]
    """(T,), Σ |τ_i| of the entries whose sign is not that of Σ_j τ_j: they lose an election of
    signs."""
    updates: npt.NDArray[np.float64]
    """(T,), Σ τ_i²."""
    lost: npt.NDArray[np.float64]
    """(T,), the part of it that is lost if base + τ_i is rounded to the base's dtype."""
    base: float
    """‖W‖² of the base's tensor."""


def entries_of(deltas: Sequence[Delta], base: Tensor) -> Entries:
    """Look at entries of one tensor.

    Args:
        deltas: τ of each task.
        base: The base's tensor, any shape and floating dtype.
    """
    m, n = matrix_shape(tuple(base.shape))
    step = math.ceil(m * n / MOST)
    step += (step + 1) % 2  # odd, so that heads of 64 rows are not met at the same places
    rows = slice(None, None, step)
    weight = base.reshape(m, n)[rows]
    parts = [_rows_of(delta, rows) for delta in deltas]
    T = len(parts)
    products, magnitudes = np.zeros((2, T, T))
    sizes, outvoted, updates, lost = np.zeros((4, T))
    height = max(1, _PANEL // max(1, T * n))
    for start in range(0, len(weight) if n else 0, height):
        panel = slice(start, start + height)
        X = torch.stack([part.entries(panel).reshape(-1) for part in parts])
        products += (X @ X.T).double().numpy()
        against = X.sign() != X.sum(0).sign()
        X.abs_()
        magnitudes += (X @ X.T).double().numpy()
        sizes += X.sum(1, dtype=torch.float64).numpy()
        outvoted += X.mul_(against).sum(1, dtype=torch.float64).numpy()
    for t, part in enumerate(parts):
        adding = Fold(weight, part, base.dtype)
        for _ in adding.panels():
            pass
        updates[t] = adding.update_norm**2
        lost[t] = (1 - adding.survived) * updates[t]
    scale = m / max(1, len(weight))
    squares = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    return Entries(
        step,
        scale * products,
        scale * magnitudes,
        scale * sizes,
        scale * outvoted,
        scale * updates,
        scale * lost,
        scale * squares,
    )


def entries_bytes(shape: tuple[int, int], count: int) -> int:
    """Return the bytes that :func:`entries_of` takes beside the deltas.

    Args:
        shape: (m, n) of the tensor.
        count: Number of tasks.
    """
    m, n = shape
    return 16 * max(_PANEL, count * n) + fold_bytes(m, n)


def _rows_of(delta: Delta, rows: slice) -> Delta:
    """Return some rows of a delta, which share its memory."""
    if isinstance(delta, LowRank):
        return LowRank(delta.B[rows], delta.A, delta.scale)
    if isinstance(delta, Stored):
        shape = delta.shape
        terms = [(c, tuned.reshape(shape)[rows]) for c, tuned in delta.terms]
        return Stored(terms, delta.base.reshape(shape)[rows], delta.factor)
    return Dense(delta.matrix[rows])
