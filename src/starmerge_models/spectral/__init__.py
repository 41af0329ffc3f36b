"""Singular value decompositions of deltas, and the truncation that STAR makes of them."""

from __future__ import annotations

from starmerge_models.deltas import Delta, LowRank
from starmerge_models.spectral.core_space import CoreSpace, core_space, on_best_device
from starmerge_models.spectral.dense import polar, svd_matrix
from starmerge_models.spectral.factored import svd_factored
from starmerge_models.spectral.gram import GramSVD, svd_dense
from starmerge_models.spectral.noise import Floor, Rounding, noise_floor, rounding_noise
from starmerge_models.spectral.remembered import remembered
from starmerge_models.spectral.svd import SVD, Decomposition, UncertainError, certainly
from starmerge_models.spectral.truncation import (
    Truncation,
    floor_of,
    kept_rank,
    truncate_and_rescale,
    truncation_of,
)


@remembered
def svd(delta: Delta) -> Decomposition:
    """Return the decomposition of a delta by the kernel that fits its structure.

    It is remembered as long as the delta itself lives, so that a sweep over η, methods or subsets
    of the models pays once for each delta. Of a low-rank delta that is its SVD; of a large dense
    one all singular values and, in 8·min(m, n)² bytes, what vectors are made from. A delta's
    tensors must not be changed after this.

    Raises:
        ValueError: A factor of a low-rank delta has a NaN or an infinity.
        torch.linalg.LinAlgError: A dense delta has.
    """
    return svd_factored(delta) if isinstance(delta, LowRank) else svd_dense(delta)


__all__ = [
    "SVD",
    "CoreSpace",
    "Decomposition",
    "Floor",
    "GramSVD",
    "Rounding",
    "Truncation",
    "UncertainError",
    "certainly",
    "core_space",
    "floor_of",
    "kept_rank",
    "noise_floor",
    "on_best_device",
    "polar",
    "remembered",
    "rounding_noise",
    "svd",
    "svd_dense",
    "svd_factored",
    "svd_matrix",
    "truncate_and_rescale",
    "truncation_of",
]
