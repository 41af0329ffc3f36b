"""The SVD of a low-rank delta, in factor space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge_models.deltas import LowRank
from starmerge_models.spectral.svd import SVD


@dataclass(frozen=True, eq=False)
class FactoredSVD:
    """The exact SVD of ``scale · B @ A``, whose vectors are computed on request."""

    S: Tensor
    """(k,) float64, descending, positive; k is the numerical rank."""
    left: Tensor
    """(r, k) float64; the columns of B @ left are the left singular vectors."""
    right: Tensor
    """(k, r) float64; the rows of right @ A are the right singular vectors."""
    B: Tensor
    """(m, r), as in the delta."""
    A: Tensor
    """(r, n), as in the delta."""

    @property
    def error(self) -> Tensor:
        """Zeros; see :class:`starmerge_models.spectral.svd.Decomposition`."""
        return torch.zeros_like(self.S)

    def first(self, k: int) -> SVD:
        """Return the first k triplets, or all if there are fewer, in O((m + n)rk)."""
        # Transposed, because BLAS is three times as fast for few long rows as for few long columns.
        U = (self.left[:, :k].T @ self.B.double().T).T
        V = (self.right[:k] @ self.A.double()).T
        return SVD(U, self.S[:k], V)

    def exact(self) -> FactoredSVD:
        """Return this SVD."""
        return self


def svd_factored(delta: LowRank) -> FactoredSVD:
    """Return the exact SVD of ``scale · B @ A`` without forming the product.

    The Gram matrices of the factors give orthonormal bases of the column and row space; in them
    the delta is a matrix of at most r × r, whose SVD gives the delta's (:meth:`LowRank.core`).

    When to use: whenever a delta has factors. Cost: O((m + n)r² + r³) in float64, against
    O(mn·min(m, n)) for the matrix. The number of triplets is the numerical rank, at most r.

    Raises:
        StarmergeError: A factor or the scale has a NaN or an infinity.
    """
    core = delta.core()
    P, S, Qh = torch.linalg.svd(core.matrix, full_matrices=False)
    return FactoredSVD(S, core.left @ P, Qh @ core.right, delta.B, delta.A)
