"""Which entries of a task vector stay, and how those that stay make up for the others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from starmerge_models.methods.kinds.entrywise import absolute_sum
from starmerge_models.selection import kth_largest

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
    flat = values.reshape(-1)
    if k <= 0 or k >= len(flat):
        return torch.full(values.shape, k > 0)
    cut = kth_largest(lambda step: torch.split(flat[::step], 2**16), len(flat), k)
    magnitudes = flat.abs().numpy()
    mask = magnitudes > cut
    mask[np.flatnonzero(magnitudes == cut)[: k - np.count_nonzero(mask)]] = True
    return torch.from_numpy(mask).reshape(values.shape)


def masked(entries: Tensor, mask: Tensor) -> Tensor:
    """Return entries, float32, of which those outside of a mask are zero."""
    # The bits times 0 or 1: a number times 0 may be −0.
    bits = entries.numpy().view(np.int32) * mask.numpy()
    return torch.from_numpy(bits.view(np.float32))


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
    # Magnitudes order as their bits do. With the places below them no two are alike, and sorting
    # numbers takes a fraction of what finding their order does.
    keys = np.abs(rows.contiguous().numpy()).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort(axis=1)
    order = torch.from_numpy((keys & np.uint64(2**32 - 1)).view(np.int64))
    chances = torch.empty(rows.shape, dtype=torch.float64)
    return chances.scatter_(1, order, steps.expand(rows.shape))


def l1_factor(entries: Tensor, mask: Tensor) -> float:
    """Return Σ|x| / Σ|x ⊙ mask|, which makes what stays as large as all was; 1 below 1e-7."""
    return l1_ratio(absolute_sum(entries), absolute_sum(entries * mask))


def l1_ratio(whole: float, left: float) -> float:
    """Return Σ|x| / Σ|x ⊙ mask| of two sums; 1 if one is below 1e-7."""
    return 1.0 if min(whole, left) < _SMALLEST else whole / left
