"""The SVD of a matrix in float64, and what is made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from starmerge_models.device import ready
from starmerge_models.spectral.svd import SVD


def svd_matrix(matrix: Tensor, floor: float = -1.0) -> SVD:
    """Return the SVD of a float64 matrix (m, n), without the triplets of σ ≤ ``floor``.

    Args:
        matrix: Of a size at which LAPACK will do, such as one in Core Space.
        floor: What counts as zero; whatever is negative keeps all min(m, n) triplets.
    """
    U, S, Vh = torch.linalg.svd(ready(matrix), full_matrices=False)
    return SVD(U, S, Vh.T).above(floor)


def svd_bytes(m: int, n: int) -> int:
    """Return the bytes at the peak of :func:`svd_matrix`, its result included.

    With p = min(m, n): LAPACK's dgesdd works on a copy (m, n), returns vectors (m, p) and (p, n),
    and takes 4p² + 7p numbers to work with.
    """
    p = min(m, n)
    return 8 * (m * n + p * (m + n) + 4 * p * p + 7 * p)


def polar(matrix: Tensor, noise: float = 1e-10) -> Tensor:
    """Return the polar factor U Vᵀ of X = U Σ Vᵀ, the nearest matrix with orthonormal columns.

    Directions that X does not have, σ ≤ noise · σ_1, are left out: there the factor is any, and the
    result a partial isometry.

    Args:
        matrix: (m, n) float64.
        noise: How well X is known, as a share of σ_1.
    """
    U, S, Vh = torch.linalg.svd(ready(matrix), full_matrices=False)
    kept = noise * S[:1].sum() < S
    factor: Tensor = U[:, kept] @ Vh[kept]
    return factor


def polar_bytes(m: int, n: int) -> int:
    """Return the bytes at the peak of :func:`polar`, its result included.

    The SVD; or its vectors, those of them that are kept, and the factor.
    """
    p = min(m, n)
    return max(svd_bytes(m, n), 8 * (2 * p * (m + n) + m * n))
