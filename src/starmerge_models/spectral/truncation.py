"""STAR's rank rule and rescale (arXiv 2502.10339)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge_models.deltas import LowRank
from starmerge_models.spectral.noise import Floor, Rounding, noise_floor
from starmerge_models.spectral.svd import Decomposition, UncertainError, certainly

ROUNDING = 1e-12
"""A share of the nuclear norm this close below η counts as reached: it differs by rounding."""

NUCLEAR = 1e-5
"""What may be unknown of a nuclear norm, as a share of it: the rescale restores it."""


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

    σ'_k = σ_k · Σσ / Σ_{k≤r}σ for k ≤ r, the rest is dropped. If the decomposition leaves open what
    r is, or Σσ to 1e-5, the exact one is taken.

    Args:
        decomposed: The delta's decomposition.
        eta: Share of the nuclear norm to keep, in percent, in (0, 100].
        rank: Keep this many triplets instead (fewer where the delta has fewer).
        rescale: Whether to restore the nuclear norm; without, the factor is 1.
        rounding: The noise in a stored delta; where its floor applies, what lies below is dropped
            first, and Σσ is of what lies above.

    Returns:
        The truncated delta with factors of rank r, float64 where the decomposition's vectors are,
        and what was done.
    """

    def truncated(decomposed: Decomposition) -> tuple[LowRank, Truncation]:
        found = truncation_of(decomposed, eta=eta, rank=rank, rescale=rescale, rounding=rounding)
        values = decomposed.S[: found.rank] * found.factor
        return decomposed.first(found.rank).compose(values), found

    return certainly(decomposed, truncated)


def truncation_of(
    decomposed: Decomposition,
    *,
    eta: float,
    rank: int | None = None,
    rescale: bool = True,
    rounding: Rounding | None = None,
) -> Truncation:
    """Tell what :func:`truncate_and_rescale` would do, from the singular values alone.

    Args:
        decomposed: The delta's decomposition.
        eta: As there.
        rank: As there.
        rescale: As there.
        rounding: As there.

    Raises:
        UncertainError: The decomposition leaves open what r is, or Σσ to 1e-5.
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
        UncertainError: The decomposition leaves open how many singular values are above it, or
            whether it applies.
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
    """Return the rank to keep, by η or a given one, of singular values known to some error.

    Whether r reach a share s of Σσ is the sign of (1 − s) Σ_{k≤r}σ − s Σ_{k>r}σ, which is known to
    (1 − s) Σ_{k≤r}ε + s Σ_{k>r}ε.

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
