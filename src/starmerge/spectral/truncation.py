"""STAR's rank rule and rescale (arXiv 2502.10339)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge.deltas import LowRank
from starmerge.spectral.noise import Floor
from starmerge.spectral.svd import SVD

ROUNDING = 1e-12
"""A share of the nuclear norm this close below η counts as reached: it differs by rounding."""


@dataclass(frozen=True)
class Truncation:
    """What a truncation did to one delta."""

    rank: int
    """Singular values kept, r."""
    nuclear_before: float
    """Σσ of the delta."""
    nuclear_after: float
    """Σσ' of what was kept, after the rescale."""
    factor: float
    """The rescale factor Σσ / Σ_{k≤r}σ; 1 for a zero delta."""
    noise: Floor | None = None
    """The noise floor, where one was looked for; if it applies, Σσ is of what stands above it."""


def kept_rank(S: Tensor, eta: float) -> int:
    """Return the smallest r with σ_1 + … + σ_r ≥ η % of Σσ.

    Args:
        S: (k,) singular values, descending.
        eta: η, in percent, in (0, 100].

    Returns:
        r in 1 … k; 0 if all singular values are zero or there are none.
    """
    cumulative = S.double().cumsum(0)
    if len(S) == 0 or cumulative[-1] == 0:
        return 0
    wanted = cumulative[-1] * (eta / 100) * (1 - ROUNDING)
    return int(torch.searchsorted(cumulative, wanted)) + 1


def truncate_and_rescale(
    svd: SVD, *, eta: float, rank: int | None = None, rescale: bool = True
) -> tuple[LowRank, Truncation]:
    """Keep the leading triplets of a delta and rescale them to its nuclear norm.

    σ'_k = σ_k · Σσ / Σ_{k≤r}σ for k ≤ r, the rest is dropped.

    Args:
        svd: The delta's SVD.
        eta: Share of the nuclear norm to keep, in percent, in (0, 100].
        rank: Keep this many triplets instead (fewer where the delta has fewer).
        rescale: Whether to restore the nuclear norm; without, the factor is 1.

    Returns:
        The truncated delta with float64 factors of rank r, and what was done.
    """
    r = kept_rank(svd.S, eta) if rank is None else min(rank, kept_rank(svd.S, 100))
    before, kept = float(svd.S.sum()), float(svd.S[:r].sum())
    factor = before / kept if r and rescale else 1.0
    values = svd.S[:r] * factor
    return svd.compose(values), Truncation(r, before, float(values.sum()), factor)
