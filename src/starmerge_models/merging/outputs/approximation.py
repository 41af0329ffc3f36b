"""Low-rank approximation of a merged update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank, is_finite, total
from starmerge_models.merging.fold import factors_of
from starmerge_models.spectral import svd
from starmerge_models.spectral.gram import svd_dense_bytes
from starmerge_models.spectral.leading import leading, leading_bytes
from starmerge_models.spectral.svd import SVD, with_exact_fallback


@dataclass(frozen=True, eq=False)
class Approximation:
    """An approximation ``left @ right`` of an update, in float32 unless :func:`rounded`."""

    left: Tensor
    """(m, r)."""
    right: Tensor
    """(r, n)."""
    norm: float
    """‖δ‖ of the update."""
    error: float
    """‖δ − left @ right‖; 0 if the factors are those of the update."""


def approximate(delta: Delta, rank: int) -> Approximation:
    """Return the best approximation of an update by factors of at most a given rank.

    Args:
        delta: The update.
        rank: The highest rank.
    """
    if isinstance(delta, LowRank):
        if int((delta.B.any(0) & delta.A.any(1)).sum()) <= rank:
            left, right = factors_of(delta)
            return Approximation(left, right, delta.frobenius(), 0.0)
        return _composed(*leading(delta, rank))
    decomposed = svd(delta)
    first = with_exact_fallback(decomposed, lambda sure: sure.first(rank))
    return _composed(first, float(decomposed.S[len(first.S) :].square().sum()))


def _composed(first: SVD, lost: float) -> Approximation:
    root = first.S.sqrt()
    left = (first.U * root).float()
    right = (first.V * root).T.float().contiguous()
    norm = math.sqrt(float(first.S.square().sum()) + lost)
    return Approximation(left, right, norm, math.sqrt(lost))


def rounded(made: Approximation, dtype: torch.dtype) -> Approximation:
    """Return an update whose factors are stored in a dtype; the error is that of both steps.

    Args:
        made: The update, its factors in float32.
        dtype: Of the factors that are stored.

    Returns:
        The factors in that dtype; the error is infinite where they overflow it.
    """
    left, right = made.left.to(dtype), made.right.to(dtype)
    if not (is_finite(left) and is_finite(right)):
        return Approximation(left, right, made.norm, math.inf)
    if dtype == torch.float32:
        return made
    apart = distance(made, LowRank(left.float(), right.float()))
    return Approximation(left, right, made.norm, math.hypot(made.error, apart))


def approximation_bytes(m: int, n: int, r: int | None, k: int, width: int) -> int:
    """Return an upper bound of the peak bytes of :func:`approximate`, without the update.

    Args:
        m: Rows of the update.
        n: Columns of the update.
        r: Upper bound of its number of factors; None for a dense update.
        k: The highest rank.
        width: Bytes of an entry of a dense update when it is read, 4 or 8.
    """
    decomposing = svd_dense_bytes(m, n, width, k) if r is None else leading_bytes(m, n, r, k)
    # The triplets, the vectors times √σ in float64, and the factors.
    return decomposing + 24 * (m + n) * k


def distance(made: Approximation, stored: LowRank) -> float:
    """Return the Frobenius norm of the change of a product L R by the rounding of its factors.

    Computed as ``L R − L' R' = (L − L') R + L' (R − R')``, because the direct difference would be
    dominated by the rounding of the products.

    Args:
        made: The factors L and R.
        stored: L' and R', with the scale 1.
    """
    left, right = stored.B, stored.A
    apart = total([LowRank(made.left - left, made.right), LowRank(left, made.right - right)])
    if apart.rank > min(apart.shape):
        return Dense(apart.entries()).frobenius()  # takes less memory than that many factors
    return apart.frobenius()


def distance_bytes(m: int, n: int, k: int) -> int:
    """Return the peak bytes of :func:`distance` for factors (m, k) and (k, n)."""
    r = 2 * k
    differences = 8 * (m + n) * r
    if r > min(m, n):
        # The float64 factors, their product, the scaled product, and its float32 copy.
        return differences + 8 * (m + n) * r + 20 * m * n
    # The core of the factors; see LowRank.core.
    return differences + 8 * max(m, n) * r + 64 * r**2
