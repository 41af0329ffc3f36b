"""A merged update in factors of some rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from starmerge.deltas import Delta, LowRank, total
from starmerge.merging.fold import factors_of
from starmerge.spectral import svd
from starmerge.spectral.leading import leading
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
        if int((delta.B.any(0) & delta.A.any(1)).sum()) <= rank:
            left, right = factors_of(delta)
            return Approximated(left, right, delta.frobenius(), 0.0)
        return _composed(*leading(delta, rank))
    decomposed = svd(delta)
    first = certainly(decomposed, lambda sure: sure.first(rank))
    return _composed(first, float(decomposed.S[len(first.S) :].square().sum()))


def _composed(first: SVD, lost: float) -> Approximated:
    root = first.S.sqrt()
    left = (first.U * root).float()
    right = (first.V * root).T.float().contiguous()
    norm = math.sqrt(float(first.S.square().sum()) + lost)
    return Approximated(left, right, norm, math.sqrt(lost))


def distance(made: Approximated, stored: LowRank) -> float:
    """Return how far factors that were rounded are from the product that they stand for."""
    return total([LowRank(made.left, made.right), stored.scaled(-1)]).frobenius()
