"""Core Space: the task vectors of one tensor in common orthonormal bases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge.deltas import Delta, Dense, LowRank

FLOAT64_NOISE = 1e-10
"""What float64 arithmetic may add to a singular value, and more, as a share of the norm."""

FLOAT32_NOISE = 1e-6
"""The same for deltas whose entries were rounded to float32: about 2⁻²⁴ whatever the size."""

CANCELLED = 1e-13
"""A product of factors that is at most this share of its terms is rounding."""


@dataclass(frozen=True, eq=False)
class CoreSpace:
    """Matrices τ_t = U C_t Vᵀ, of which a method that any rotation leaves alone need only see C_t.

    Source: arXiv 2509.17786. The bases span the columns of all B_t and the rows of all A_t, so
    nothing is lost. Deltas whose ranks add up to more than the matrix has rows or columns, as those
    of most dense ones do, stay in the coordinates they have.
    """

    matrices: list[Tensor]
    """C_t, (p, q) float64 each."""
    shape: tuple[int, int]
    """(m, n) of the deltas themselves."""
    U: Tensor | None
    """(m, p) float64, orthonormal columns; None for the coordinates there are, p = m."""
    V: Tensor | None
    """(n, q) float64, orthonormal columns; None for the coordinates there are, q = n."""
    noise: float
    """Singular values below this share of the task vectors' norms are rounding."""

    @property
    def floor(self) -> float:
        """Singular values of the C_t, of their sums and differences that are at most this are zero.

        :attr:`noise` times the sum of the task vectors' Frobenius norms.
        """
        return self.noise * sum(float(torch.linalg.vector_norm(C)) for C in self.matrices)

    def delta(self, matrix: Tensor) -> Delta:
        """Return what a matrix (p, q) of this space is as a delta (m, n), rounded to float32 once.

        The shorter of p and q becomes the rank; a delta is dense if that is m or n.
        """
        if matrix.shape[0] <= matrix.shape[1]:
            right = matrix if self.V is None else matrix @ self.V.T
            return (
                Dense(right.float()) if self.U is None else LowRank(self.U.float(), right.float())
            )
        left = matrix if self.U is None else self.U @ matrix
        return Dense(left.float()) if self.V is None else LowRank(left.float(), self.V.T.float())

    def product(self, left: Tensor, right: Tensor) -> Delta:
        """Return what left · rightᵀ, (p, r) and (q, r), is as a delta (m, n) of rank r.

        It is rounded to float32 once, and dense if r is m or n.
        """
        if left.shape[1] >= min(self.shape):
            return self.delta(left @ right.T)
        B = left if self.U is None else self.U @ left
        A = right if self.V is None else self.V @ right
        return LowRank(B.float(), A.T.float())


def core_space(deltas: Sequence[Delta]) -> CoreSpace:
    """Bring deltas of one shape into common orthonormal bases, exactly to float64.

    By QR of the factors side by side. Cost: O((m + n)R²) for a total rank R, against the matrices
    themselves if one of the deltas is dense.

    Raises:
        ValueError: There is no delta, or their shapes differ.
    """
    shapes = {delta.shape for delta in deltas}
    if len(shapes) != 1:
        raise ValueError(f"The deltas have no common shape: {sorted(shapes)}.")
    m, n = next(iter(shapes))
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(low) < len(deltas):
        matrices = [_matrix(delta) for delta in deltas]
        noise = max(map(_noise, deltas))
        # Of a few matrices much longer than high, the rows span a part of their space.
        U, lefts = _common_basis(matrices) if m > n else (None, matrices)
        if U is not None:
            return CoreSpace(lefts, (m, n), U, None, noise)
        V, rights = _common_basis([matrix.T for matrix in matrices]) if n > m else (None, [])
        if V is not None:
            return CoreSpace([right.T for right in rights], (m, n), None, V, noise)
        return CoreSpace(matrices, (m, n), None, None, noise)
    U, lefts = _common_basis([delta.B for delta in low])
    V, rights = _common_basis([delta.A.T for delta in low])
    matrices = [
        _product(left, right, delta.scale)
        for left, right, delta in zip(lefts, rights, low, strict=True)
    ]
    return CoreSpace(matrices, (m, n), U, V, FLOAT64_NOISE)


def _common_basis(factors: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """Return an orthonormal basis (m, p) of all columns, and the factors (p, r_t) in it."""
    wide = [factor.double() for factor in factors]
    ranks = [factor.shape[1] for factor in wide]
    if sum(ranks) >= wide[0].shape[0]:
        return None, wide
    Q, R = torch.linalg.qr(torch.cat(wide, dim=1))
    return Q, list(R.split(ranks, dim=1))


def _matrix(delta: Delta) -> Tensor:
    if isinstance(delta, LowRank):
        return _product(delta.B.double(), delta.A.double().T, delta.scale)
    return delta.matrix.double()


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale · left · rightᵀ, and zeros where only rounding is left of terms that cancel.

    A zero task vector must be one: methods normalise task vectors and count them.
    """
    product = (left * scale) @ right.T
    sizes = torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=0)
    terms = abs(scale) * float(sizes.sum())
    whole = float(torch.linalg.vector_norm(product)) > CANCELLED * terms
    return product if whole else torch.zeros_like(product)


def _noise(delta: Delta) -> float:
    exact = isinstance(delta, LowRank) or delta.dtype == torch.float64
    return FLOAT64_NOISE if exact else FLOAT32_NOISE
