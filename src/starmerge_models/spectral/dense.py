"""The SVD of a float64 matrix, and its polar factor."""

from __future__ import annotations

import torch
from torch import Tensor

from starmerge_models.device import ready
from starmerge_models.spectral.svd import SVD


def svd_matrix(matrix: Tensor, floor: float = -1.0) -> SVD:
    """Return the SVD of a float64 matrix (m, n), without the triplets of σ ≤ ``floor``.

    Args:
        matrix: A matrix small enough for LAPACK, such as one in Core Space.
        floor: Singular values up to this count as zero; a negative value keeps all min(m, n)
            triplets.
    """
    U, S, Vh = torch.linalg.svd(ready(matrix), full_matrices=False)
    return SVD(U, S, Vh.T).above(floor)


def svd_bytes(m: int, n: int) -> int:
    """Return the peak bytes of :func:`svd_matrix`, including its result.

    With p = min(m, n): LAPACK's dgesdd uses a copy (m, n), returns vectors (m, p) and (p, n), and
    takes a work space of 4p² + 7p numbers.
    """
    p = min(m, n)
    return 8 * (m * n + p * (m + n) + 4 * p * p + 7 * p)


def polar(matrix: Tensor, noise: float = 1e-10) -> Tensor:
    """Return the polar factor U Vᵀ of X = U Σ Vᵀ, the nearest matrix with orthonormal columns.

    Directions with σ ≤ noise · σ_1 are dropped, because the polar factor is not unique in them; the
    result is then a partial isometry.

    Args:
        matrix: (m, n) float64.
        noise: Precision of X, as a share of σ_1.
    """
    U, S, Vh = torch.linalg.svd(ready(matrix), full_matrices=False)
    kept = noise * S[:1].sum() < S
    factor: Tensor = U[:, kept] @ Vh[kept]
    return factor


def polar_bytes(m: int, n: int) -> int:
    """Return the peak bytes of :func:`polar`, including its result.

    The peak is that of the SVD, or the sum of its vectors, the kept vectors, and the factor.
    """
    p = min(m, n)
    return max(svd_bytes(m, n), 8 * (2 * p * (m + n) + m * n))
