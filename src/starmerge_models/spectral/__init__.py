"""Singular value decompositions of deltas, and STAR's truncation."""

from __future__ import annotations

from starmerge_models.deltas import Delta, LowRank
from starmerge_models.spectral.core_space import CoreSpace, core_space, on_best_device
from starmerge_models.spectral.dense import polar, svd_matrix
from starmerge_models.spectral.factored import svd_factored
from starmerge_models.spectral.gram import GramSVD, svd_dense
from starmerge_models.spectral.memoisation import memoised
from starmerge_models.spectral.noise import Floor, Rounding, noise_floor, rounding_noise
from starmerge_models.spectral.svd import SVD, Decomposition, UncertainError, with_exact_fallback
from starmerge_models.spectral.truncation import (
    Truncation,
    floor_of,
    kept_rank,
    truncate_and_rescale,
    truncation_of,
)


@memoised
def svd(delta: Delta) -> Decomposition:
    """Return the decomposition of a delta by the kernel that fits its structure.

    The result is cached for the lifetime of the delta, so that a sweep over η, methods or subsets
    of the models decomposes each delta once. The cache holds the SVD of a low-rank delta; for a
    large dense delta it holds all singular values and 8·min(m, n)² bytes from which vectors are
    computed on request. A delta's tensors must not be changed after the call.

    Raises:
        StarmergeError: A factor of a low-rank delta has a NaN or an infinity.
        torch.linalg.LinAlgError: A dense delta has a NaN or an infinity.
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
    "core_space",
    "floor_of",
    "kept_rank",
    "memoised",
    "noise_floor",
    "on_best_device",
    "polar",
    "rounding_noise",
    "svd",
    "svd_dense",
    "svd_factored",
    "svd_matrix",
    "truncate_and_rescale",
    "truncation_of",
    "with_exact_fallback",
]
