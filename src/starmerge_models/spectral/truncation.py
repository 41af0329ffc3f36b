"""STAR's rank rule and rescale (arXiv 2502.10339)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge_models.deltas import LowRank
from starmerge_models.spectral.noise import Floor, Rounding, noise_floor
from starmerge_models.spectral.svd import Decomposition, UncertainError, with_exact_fallback

ROUNDING = 1e-12
"""Tolerance of the comparison with η: a share of the nuclear norm this close below η reaches it."""

NUCLEAR = 1e-5
"""Tolerated error of the nuclear norm, as a share of it, because the rescale restores it."""


@dataclass(frozen=True)
class Truncation:
    """The record of one delta's truncation."""

    rank: int
    """Number of kept singular values, r."""
    nuclear_before: float
    """Σσ of the delta."""
    nuclear_after: float
    """Σσ' of the kept singular values, after the rescale."""
    factor: float
    """The rescale factor Σσ / Σ_{k≤r}σ; 1 for a zero delta."""
    noise: Floor | None = None
    """The noise floor, if it was computed; if it applies, Σσ sums the values above it."""


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
    return int(torch.searchsorted(cumulative, cumulative[-1] * _share(eta))) + 1


def truncate_and_rescale(
    decomposed: Decomposition,
    *,
    eta: float,
    rank: int | None = None,
    rescale: bool = True,
    rounding: Rounding | None = None,
) -> tuple[LowRank, Truncation]:
    """Keep the leading triplets of a delta and rescale them to its nuclear norm.

    σ'_k = σ_k · Σσ / Σ_{k≤r}σ for k ≤ r, the others are dropped. If the decomposition does not
    determine r, or Σσ to 1e-5, the exact one is used.

    Args:
        decomposed: The delta's decomposition.
        eta: Share of the nuclear norm to keep, in percent, in (0, 100].
        rank: Keep this many triplets instead (fewer if the delta has fewer).
        rescale: Whether to restore the nuclear norm; otherwise the factor is 1.
        rounding: The rounding noise in a stored delta. If its floor applies, singular values below
            it are dropped first, and Σσ sums the others.

    Returns:
        The truncated delta with factors of rank r, float64 if the decomposition's vectors are, and
        the record of the truncation.
    """

    def truncated(decomposed: Decomposition) -> tuple[LowRank, Truncation]:
        found = truncation_of(decomposed, eta=eta, rank=rank, rescale=rescale, rounding=rounding)
        values = decomposed.S[: found.rank] * found.factor
        return decomposed.first(found.rank).compose(values), found

    return with_exact_fallback(decomposed, truncated)


def truncation_of(
    decomposed: Decomposition,
    *,
    eta: float,
    rank: int | None = None,
    rescale: bool = True,
    rounding: Rounding | None = None,
) -> Truncation:
    """Return the record of :func:`truncate_and_rescale`, from the singular values alone.

    Args:
        decomposed: The delta's decomposition.
        eta: See :func:`truncate_and_rescale`.
        rank: See :func:`truncate_and_rescale`.
        rescale: See :func:`truncate_and_rescale`.
        rounding: See :func:`truncate_and_rescale`.

    Raises:
        UncertainError: The decomposition does not determine r, or Σσ to 1e-5.
    """
    S, error, floor = decomposed.S, decomposed.error, None
    if rounding is not None and len(S):
        floor = floor_of(decomposed, rounding)
        if floor.applies:
            S, error = S[: floor.above], error[: floor.above]
    r = _certain_rank(S, error, eta, rank)
    before, kept = float(S.sum()), float(S[:r].sum())
    factor = before / kept if r and rescale else 1.0
    return Truncation(r, before, float((S[:r] * factor).sum()), factor, floor)


def floor_of(decomposed: Decomposition, rounding: Rounding) -> Floor:
    """Return the noise floor of a delta; see :func:`starmerge_models.spectral.noise.noise_floor`.

    Raises:
        UncertainError: The decomposition does not determine the number of singular values above
            the floor, or whether it applies.
    """
    S, error = decomposed.S, decomposed.error
    floor = noise_floor(S, rounding)
    if floor.value == 0:
        return floor
    if bool(((S - floor.value).abs() < error).any()):
        raise UncertainError("A singular value is as close to the noise floor as its own error.")
    below, doubt = S[floor.above :], error[floor.above :]
    energy, unknown = float(below.square().sum()), float((doubt * (2 * below + doubt)).sum())
    if abs(floor.share - 2) * energy < floor.share * unknown:
        raise UncertainError("Whether the noise floor applies hangs on rounding.")
    return floor


def _certain_rank(S: Tensor, error: Tensor, eta: float, rank: int | None) -> int:
    """Return the rank to keep, by η or a given rank, for singular values with error bounds.

    The first r values reach a share s of Σσ if (1 − s) Σ_{k≤r}σ − s Σ_{k>r}σ ≥ 0; the error of
    this expression is at most (1 − s) Σ_{k≤r}ε + s Σ_{k>r}ε.

    Raises:
        UncertainError: Another rank would be right within the errors, or Σσ is not known.
    """
    if float(error.sum()) > NUCLEAR * float(S.sum()):
        raise UncertainError("Rounding leaves too much of the nuclear norm open.")
    # A given rank only needs to know that the delta has one as high.
    s = _share(eta if rank is None else 100)
    found = kept_rank(S, eta if rank is None else 100)
    r = found if rank is None else min(rank, found)
    if r == 0:
        return 0
    # The sums that decided, so that without errors there is no doubt.
    cumulative, unknown = S.cumsum(0), error.cumsum(0)
    excess = cumulative - cumulative[-1] * s
    doubt = (1 - s) * unknown + s * (unknown[-1] - unknown)
    if (r == found and excess[r - 1] < doubt[r - 1]) or (r > 1 and -excess[r - 2] < doubt[r - 2]):
        raise UncertainError(f"Whether the rank is {r} hangs on rounding.")
    return r


def _share(eta: float) -> float:
    """Return the share of the nuclear norm that counts as η."""
    return eta / 100 * (1 - ROUNDING)
