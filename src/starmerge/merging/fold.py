"""Adding a merged delta to a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge.deltas import Delta, LowRank, wide

PANEL_ROWS = 256
"""Rows of a weight that are merged at once."""


@dataclass(frozen=True)
class Folded:
    """A weight with a delta added."""

    weight: Tensor
    """The merged tensor, in the output's dtype."""
    update_norm: float
    """Frobenius norm of the delta, ‖Δ‖."""
    survived: float
    """Share of the update that survives the rounding to the output's dtype: 1 − ‖e‖²/‖Δ‖², where e
    is what rounding changed of it; not below 0, and 1 for a zero delta."""


def fold(base: Tensor, delta: Delta, dtype: torch.dtype) -> Folded:
    """Add a delta to a weight in float32, and round once to the output's dtype.

    A float64 weight is added to in float64. Works through panels of :data:`PANEL_ROWS` rows, so
    that the wider copies stay in the cache.

    Args:
        base: The base's tensor, any shape and floating dtype.
        delta: The merged delta, of the same shape as a matrix.
        dtype: Dtype of the result.
    """
    weight = base.reshape(delta.shape)
    working = wide(base.dtype)
    merged = torch.empty(delta.shape, dtype=dtype)
    update_energy = error_energy = 0.0
    for start in range(0, len(weight), PANEL_ROWS):
        rows = slice(start, start + PANEL_ROWS)
        exact = weight[rows].to(working)
        update = _rows(delta, rows)
        merged[rows] = (exact + update).to(dtype)
        # What the output's dtype makes of the base is no part of the update.
        arrived = merged[rows].to(working) - exact.to(dtype).to(working)
        update_energy += float(torch.linalg.vector_norm(update, dtype=torch.float64)) ** 2
        error_energy += float(torch.linalg.vector_norm(arrived - update, dtype=torch.float64)) ** 2
    survived = 1.0 - error_energy / update_energy if update_energy else 1.0
    return Folded(merged.reshape(base.shape), math.sqrt(update_energy), max(0.0, survived))


def _rows(delta: Delta, rows: slice) -> Tensor:
    """Return some rows of a delta in float32."""
    if isinstance(delta, LowRank):
        return (delta.B[rows].float() * delta.scale) @ delta.A.float()
    return delta.matrix[rows].float()
