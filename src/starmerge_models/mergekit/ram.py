"""Reinforced agent merging: the mean of each entry over the models that changed it.

Source: arXiv 2601.13572; mergekit 0.1.5, ``merge_methods/ram.py``, which counts the shares of
ramplus_tl separately in each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense
from starmerge_models.methods.kinds.entrywise import panels


def ram(
    deltas: Mapping[int, Delta], epsilon: float, *, r: float = 0.0, alpha: float = 0.0
) -> Dense:
    """Merge one tensor.

    An entry is active in model t if |d_t| > ε. If it is active in several models, the update is
    their mean; if it is active in a single model, the update is λ_t d_t. With s_t the number of
    model t's active entries that other models share, and u_t the number of the others,
    λ_t = 1 + r · min(s_t / u_t, α).

    Args:
        deltas: The task vectors d_t of the models that change the tensor.
        epsilon: ε, at least 0.
        r: Amplification of the entries of a single model; 0 is ram.
        alpha: α, the upper limit of s_t / u_t.
    """
    shape = next(iter(deltas.values())).shape
    boosts = torch.ones(len(deltas), 1, 1, dtype=torch.float64)
    if r != 0:
        shared = torch.zeros(len(deltas), dtype=torch.float64)
        alone = torch.zeros(len(deltas), dtype=torch.float64)
        for rows in panels(shape, len(deltas)):
            _, active, count = _active(deltas, rows, epsilon)
            shared += (active & (count > 1)).sum((1, 2))
            alone += (active & (count == 1)).sum((1, 2))
        # The factor is unused for a model without entries of its own.
        boosts[:, 0, 0] = 1 + r * (shared / alone.clamp(min=1)).clamp(max=alpha)
    merged = torch.empty(shape, dtype=torch.float32)
    for rows in panels(shape, len(deltas)):
        d, active, count = _active(deltas, rows, epsilon)
        factors = torch.where(count == 1, boosts, 1 / count.clamp(min=1).double())
        merged[rows] = torch.where(active, factors * d, 0.0).sum(0).float()
    return Dense(merged)


def _active(
    deltas: Mapping[int, Delta], rows: slice, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return some rows of all task vectors, their activity masks, and the number of active models.

    Returns:
        (T', rows, n) float64, (T', rows, n) bool, (rows, n) int64.
    """
    d = torch.stack([delta.entries(rows) for delta in deltas.values()])
    active = d.abs() > epsilon
    return d.double(), active, active.sum(0)
