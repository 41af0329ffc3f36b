"""Singular value decompositions of deltas, and the truncation that STAR makes of them."""

from __future__ import annotations

from starmerge.deltas import Delta, LowRank
from starmerge.spectral.dense import svd_dense
from starmerge.spectral.factored import svd_factored
from starmerge.spectral.svd import SVD
from starmerge.spectral.truncation import Truncation, kept_rank, truncate_and_rescale


def svd(delta: Delta) -> SVD:
    """Return the exact thin SVD of a delta by the kernel that fits its structure."""
    return svd_factored(delta) if isinstance(delta, LowRank) else svd_dense(delta)


__all__ = [
    "SVD",
    "Truncation",
    "kept_rank",
    "svd",
    "svd_dense",
    "svd_factored",
    "truncate_and_rescale",
]
