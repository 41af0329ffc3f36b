"""A merged update in factors of some rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank, total
from starmerge_models.merging.fold import factors_of
from starmerge_models.spectral import svd
from starmerge_models.spectral.gram import svd_dense_bytes
from starmerge_models.spectral.leading import leading, leading_bytes
from starmerge_models.spectral.svd import SVD, with_exact_fallback


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
    first = with_exact_fallback(decomposed, lambda sure: sure.first(rank))
    return _composed(first, float(decomposed.S[len(first.S) :].square().sum()))


def _composed(first: SVD, lost: float) -> Approximated:
    root = first.S.sqrt()
    left = (first.U * root).float()
    right = (first.V * root).T.float().contiguous()
    norm = math.sqrt(float(first.S.square().sum()) + lost)
    return Approximated(left, right, norm, math.sqrt(lost))


def approximation_bytes(m: int, n: int, r: int | None, k: int, width: int) -> int:
    """Return the bytes at the peak of :func:`approximated`, beside the update, at most.

    Args:
        m: Rows of the update.
        n: Its columns.
        r: Its factors, at most; None: it is dense.
        k: The highest rank.
        width: Bytes of an entry of a dense update as it is looked at, 4 or 8.
    """
    decomposing = svd_dense_bytes(m, n, width, k) if r is None else leading_bytes(m, n, r, k)
    # The triplets, times the roots in float64, and the factors.
    return decomposing + 24 * (m + n) * k


def distance(made: Approximated, stored: LowRank) -> float:
    """Return how far factors that were rounded are from the product that they stand for.

    ``L R − L' R' = (L − L') R + L' (R − R')``: of the products' own difference, rounding in the
    products would be left.

    Args:
        made: The factors L and R.
        stored: L' and R', with the scale 1.
    """
    left, right = stored.B, stored.A
    apart = total([LowRank(made.left - left, made.right), LowRank(left, made.right - right)])
    if apart.rank > min(apart.shape):
        return Dense(apart.entries()).frobenius()  # is smaller than so many factors
    return apart.frobenius()


def distance_bytes(m: int, n: int, k: int) -> int:
    """Return the bytes at the peak of :func:`distance`, of factors (m, k) and (k, n)."""
    r = 2 * k
    differences = 8 * (m + n) * r
    if r > min(m, n):
        # The factors in float64; their product, scaled, and rounded to float32.
        return differences + 8 * (m + n) * r + 20 * m * n
    # As for the core of any factors.
    return differences + 8 * max(m, n) * r + 64 * r**2
