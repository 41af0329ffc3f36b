"""The SVD of a matrix, and what is made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from starmerge.deltas import Dense
from starmerge.spectral.svd import SVD


def svd_dense(delta: Dense) -> SVD:
    """Return the SVD of a full matrix, by LAPACK in float64.

    When to use: for deltas of full fine-tunes. Cost: O(mn·min(m, n)) and about five times the
    matrix in float64; nothing for a matrix of zeros, which has no triplets.

    Raises:
        torch.linalg.LinAlgError: LAPACK did not converge (a NaN or infinity in the matrix).
    """
    if not delta.tensor.any():
        m, n = delta.shape
        empty = torch.zeros(0, dtype=torch.float64)
        return SVD(empty.new_zeros(m, 0), empty, empty.new_zeros(n, 0))
    return svd_matrix(delta.matrix.double())


def svd_matrix(matrix: Tensor, floor: float = -1.0) -> SVD:
    """Return the SVD of a float64 matrix (m, n), without the triplets of σ ≤ ``floor``.

    Args:
        matrix: Of a size at which LAPACK will do, such as one in Core Space.
        floor: What counts as zero; whatever is negative keeps all min(m, n) triplets.
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((floor < S).sum())
    return SVD(U[:, :rank], S[:rank], Vh[:rank].T)


def polar(matrix: Tensor, noise: float = 1e-10) -> Tensor:
    """Return the polar factor U Vᵀ of X = U Σ Vᵀ, the nearest matrix with orthonormal columns.

    Directions that X does not have, σ ≤ noise · σ_1, are left out: there the factor is any, and the
    result a partial isometry.

    Args:
        matrix: (m, n) float64.
        noise: How well X is known, as a share of σ_1.
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = noise * S[:1].sum() < S
    factor: Tensor = U[:, kept] @ Vh[kept]
    return factor
