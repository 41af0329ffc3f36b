"""Entry-wise measures of task vectors: signs, magnitudes, and the rounding of the sum.

Signs are compared for methods such as TIES, which work on entries. Of a large tensor only every
``step``-th row is used, and the sums are scaled up to the whole tensor.
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

MAX_ENTRIES = 2**20
"""Approximate number of sampled entries of a larger tensor."""

_PANEL = 2**20
"""Entries of all tasks together in memory at once, but at least one row of each."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Measures of the tasks of one tensor; sums are scaled up to the whole tensor."""

    step: int
    """Stride of the sampled rows; 1: all rows."""
    products: npt.NDArray[np.float64]
    """(T, T), Σ τ_i τ_j over entries."""
    magnitudes: npt.NDArray[np.float64]
    """(T, T), Σ |τ_i τ_j|."""
    sizes: npt.NDArray[np.float64]
    """(T,), Σ |τ_i|."""
    outvoted: npt.NDArray[np.float64]
    """(T,), Σ |τ_i| over the entries whose sign differs from that of Σ_j τ_j: they lose a sign
    election."""
    updates: npt.NDArray[np.float64]
    """(T,), Σ τ_i²."""
    lost: npt.NDArray[np.float64]
    """(T,), the part of Σ τ_i² that is lost if base + τ_i is rounded to the base's dtype."""
    base: float
    """‖W‖² of the base's tensor."""


def entries_of(deltas: Sequence[Delta], base: Tensor) -> Entries:
    """Measure the entries of one tensor.

    Args:
        deltas: τ of each task.
        base: The base's tensor, any shape and floating dtype.
    """
    m, n = matrix_shape(tuple(base.shape))
    step = math.ceil(m * n / MAX_ENTRIES)
    step += (step + 1) % 2  # odd, so that heads of 64 rows are sampled at different offsets
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
    """Return the bytes that :func:`entries_of` needs in addition to the deltas.

    Args:
        shape: (m, n) of the tensor.
        count: Number of tasks.
    """
    m, n = shape
    return 16 * max(_PANEL, count * n) + fold_bytes(m, n)


def _rows_of(delta: Delta, rows: slice) -> Delta:
    """Return some rows of a delta, as views."""
    if isinstance(delta, LowRank):
        return LowRank(delta.B[rows], delta.A, delta.scale)
    if isinstance(delta, Stored):
        shape = delta.shape
        terms = [(c, tuned.reshape(shape)[rows]) for c, tuned in delta.terms]
        return Stored(terms, delta.base.reshape(shape)[rows], delta.factor)
    return Dense(delta.matrix[rows])
