"""The SVD of a low-rank delta, in factor space."""

from __future__ import annotations

import torch

from starmerge.deltas import LowRank
from starmerge.spectral.svd import SVD


def svd_factored(delta: LowRank) -> SVD:
    """Return the exact SVD of ``scale · B @ A`` without forming the product.

    The Gram matrices of the factors give orthonormal bases of the column and row space; in them
    the delta is a matrix of at most r × r, whose SVD carries over (:meth:`LowRank.core`).

    When to use: whenever a delta has factors. Cost: O((m + n)r² + r³) in float64, against
    O(mn·min(m, n)) for the matrix. The number of triplets is the numerical rank, at most r.
    """
    core = delta.core()
    P, S, Qh = torch.linalg.svd(core.matrix, full_matrices=False)
    U = delta.B.double() @ (core.left @ P)
    V = delta.A.double().T @ (Qh @ core.right).T
    return SVD(U, S, V)
