"""Singular value decompositions of deltas, and the truncation that STAR makes of them."""

from __future__ import annotations

from starmerge.deltas import Delta, LowRank
from starmerge.spectral.core_space import CoreSpace, core_space
from starmerge.spectral.dense import polar, svd_dense, svd_matrix
from starmerge.spectral.factored import svd_factored
from starmerge.spectral.noise import Floor, Rounding, noise_floor, rounding_noise
from starmerge.spectral.svd import SVD
from starmerge.spectral.truncation import Truncation, kept_rank, truncate_and_rescale


def svd(delta: Delta) -> SVD:
    """Return the exact thin SVD of a delta by the kernel that fits its structure."""
    return svd_factored(delta) if isinstance(delta, LowRank) else svd_dense(delta)


__all__ = [
    "SVD",
    "CoreSpace",
    "Floor",
    "Rounding",
    "Truncation",
    "core_space",
    "kept_rank",
    "noise_floor",
    "polar",
    "rounding_noise",
    "svd",
    "svd_dense",
    "svd_factored",
    "svd_matrix",
    "truncate_and_rescale",
]
