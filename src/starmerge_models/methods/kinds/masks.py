"""Masks that select entries of a task vector, and the factors that rescale the kept entries."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from starmerge_models.methods.kinds.entrywise import absolute_sum
from starmerge_models.selection import kth_largest

_SMALLEST = 1e-7
"""Sums of magnitudes below this are treated as zero, so that nothing is divided by them."""


def largest(values: Tensor, k: int) -> Tensor:
    """Return a mask of the k largest magnitudes; ties go to the first in row-major order.

    Args:
        values: float32, any shape, no NaN.
        k: Number of entries, at most all.

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
    """Return float32 entries with those outside of a mask set to +0."""
    # Multiply the bits by 0 or 1, because a float times 0 may be −0.
    bits = entries.numpy().view(np.int32) * mask.numpy()
    return torch.from_numpy(bits.view(np.float32))


def keep_probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probability of keeping each entry, by the rank of its magnitude in its row.

    The probabilities rise in equal steps from density − ε for the smallest magnitude to density + ε
    for the largest. Of equal magnitudes the first has the lower rank. In a row of one entry the
    probability is the density.

    Args:
        rows: (m, n) float32.
        density: Mean of the probabilities.
        epsilon: Half of their range.

    Returns:
        (m, n) float64.
    """
    n = rows.shape[1]
    if n == 1:
        return torch.full(rows.shape, density, dtype=torch.float64)
    steps = density - epsilon + 2 * epsilon * torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    # Magnitudes sort like their bits. With the index in the low bits all keys are distinct, and
    # sorting keys is several times faster than argsort.
    keys = np.abs(rows.contiguous().numpy()).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort(axis=1)
    order = torch.from_numpy((keys & np.uint64(2**32 - 1)).view(np.int64))
    chances = torch.empty(rows.shape, dtype=torch.float64)
    return chances.scatter_(1, order, steps.expand(rows.shape))


def l1_factor(entries: Tensor, mask: Tensor) -> float:
    """Return Σ|x| / Σ|x ⊙ mask|, which restores the L1 norm; 1 if a sum is below 1e-7."""
    return l1_ratio(absolute_sum(entries), absolute_sum(entries * mask))


def l1_ratio(whole: float, left: float) -> float:
    """Return Σ|x| / Σ|x ⊙ mask| from the two sums; 1 if one of them is below 1e-7."""
    return 1.0 if min(whole, left) < _SMALLEST else whole / left
