"""Which entries of a task vector stay, and how those that stay make up for the others."""

from __future__ import annotations

import torch
from torch import Tensor

from starmerge.methods.entrywise import absolute_sum
from starmerge.selection import kth_largest

_SMALLEST = 1e-7
"""Sums of magnitudes below this are not divided by."""


def largest(values: Tensor, k: int) -> Tensor:
    """Return where the k largest magnitudes are; of equal ones the first, in row-major order.

    Args:
        values: float32, any shape, no NaN.
        k: How many, at most all.

    Returns:
        A mask of the same shape, bool.
    """
    magnitudes = values.abs().reshape(-1)
    if k <= 0 or k >= len(magnitudes):
        return torch.full(values.shape, k > 0)
    cut = kth_largest(lambda: [magnitudes], k)
    mask = magnitudes > cut
    mask[(magnitudes == cut).nonzero()[: k - int(mask.sum()), 0]] = True
    return mask.reshape(values.shape)


def chances_by_rank(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the chance of each entry to stay, by the rank of its magnitude in its row.

    From density − ε for the least to density + ε for the largest, in equal steps. Of equal
    magnitudes the first has the lower rank; a row of one entry has the density.

    Args:
        rows: (m, n) float32.
        density: Mean of the chances.
        epsilon: Half their range.

    Returns:
        (m, n) float64.
    """
    n = rows.shape[1]
    if n == 1:
        return torch.full(rows.shape, density, dtype=torch.float64)
    steps = density - epsilon + 2 * epsilon * torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    order = rows.abs().sort(dim=1, stable=True).indices
    chances = torch.empty(rows.shape, dtype=torch.float64)
    return chances.scatter_(1, order, steps.expand(rows.shape))


def l1_factor(entries: Tensor, mask: Tensor) -> float:
    """Return Σ|x| / Σ|x ⊙ mask|, which makes what stays as large as all was; 1 below 1e-7."""
    whole = absolute_sum(entries)
    left = absolute_sum(torch.where(mask, entries, 0.0))
    return 1.0 if min(whole, left) < _SMALLEST else whole / left
