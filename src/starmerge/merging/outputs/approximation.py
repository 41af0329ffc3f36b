"""A merged update in factors of some rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from starmerge.deltas import Delta, LowRank, total
from starmerge.merging.fold import factors_of
from starmerge.spectral import svd
from starmerge.spectral.leading import energy_of, leading
from starmerge.spectral.svd import SVD, certainly


@dataclass(frozen=True, eq=False)
class Approximated:
    """An update as ``left @ right`` in float32."""

    left: Tensor
    """(m, r)."""
    right: Tensor
    """(r, n)."""
    norm: float
    """‖δ‖ of the update itself."""
    error: float
    """‖δ − left @ right‖; 0 where the factors are the update's own."""


def approximated(delta: Delta, rank: int) -> Approximated:
    """Return the best approximation of an update of at most some rank, in factors.

    Args:
        delta: The update.
        rank: The highest rank.
    """
    if isinstance(delta, LowRank):
        left, right = factors_of(delta)
        if left.shape[1] <= rank:
            return Approximated(left, right, delta.frobenius(), 0.0)
        first = leading(delta, rank)
        # Where nothing is cut off, the difference of two energies would be rounding alone.
        is_whole = rank >= min(delta.shape)
        energy = float(first.S.square().sum()) if is_whole else energy_of(delta)
        return _composed(first, energy)
    decomposed = svd(delta)
    first = certainly(decomposed, lambda sure: sure.first(rank))
    return _composed(first, float(decomposed.S.square().sum()))


def _composed(first: SVD, energy: float) -> Approximated:
    root = first.S.sqrt()
    left = (first.U * root).float()
    right = (first.V * root).T.float().contiguous()
    kept = float(first.S.square().sum())
    return Approximated(left, right, math.sqrt(energy), math.sqrt(max(0.0, energy - kept)))


def distance(made: Approximated, stored: LowRank) -> float:
    """Return how far factors that were rounded are from the product that they stand for."""
    return total([LowRank(made.left, made.right), stored.scaled(-1)]).frobenius()
