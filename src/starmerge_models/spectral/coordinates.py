"""One task vector in Core Space: its matrix C_t, or factors of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from starmerge_models.device import ready
from starmerge_models.spectral.dense import svd_bytes, svd_matrix
from starmerge_models.spectral.svd import SVD

CANCELLED = 1e-13
"""A product of factors that is at most this share of its terms is rounding."""


class Coordinates(Protocol):
    """C_t (p, q) of one task vector, however it is kept."""

    @property
    def matrix(self) -> Tensor:
        """C_t, (p, q) float64."""

    @property
    def norm(self) -> float:
        """‖C_t‖, Frobenius'."""

    @property
    def is_zero(self) -> bool:
        """Whether it is zero, or was all rounding."""

    def svd(self, floor: float) -> SVD:
        """Return the SVD, without the triplets of σ ≤ ``floor``.

        It is made once, and kept as long as this object is.
        """


@dataclass(frozen=True, eq=False)
class Whole:
    """C_t as a matrix."""

    matrix: Tensor
    """(p, q) float64."""

    @cached_property
    def norm(self) -> float:
        """See :class:`Coordinates`."""
        return float(torch.linalg.vector_norm(self.matrix))

    @property
    def is_zero(self) -> bool:
        """See :class:`Coordinates`."""
        return not self.matrix.any()

    def svd(self, floor: float) -> SVD:
        """Return the SVD; see :class:`Coordinates`."""
        return self._svd.above(floor)

    @cached_property
    def _svd(self) -> SVD:
        return svd_matrix(self.matrix)


@dataclass(frozen=True, eq=False)
class Factored:
    """C_t = scale · left · rightᵀ, multiplied out each time that the matrix is asked for."""

    left: Tensor
    """(p, r), any floating dtype."""
    right: Tensor
    """(q, r), any floating dtype."""
    scale: float

    @property
    def matrix(self) -> Tensor:
        """See :class:`Coordinates`; made anew at each look, by :func:`product`."""
        return product(self.left.double(), self.right.double(), self.scale)

    @cached_property
    def norm(self) -> float:
        """See :class:`Coordinates`; from the SVD."""
        return float(torch.linalg.vector_norm(self._svd.S))

    @property
    def is_zero(self) -> bool:
        """See :class:`Coordinates`; from the SVD."""
        return not self._svd.S.any()

    def svd(self, floor: float) -> SVD:
        """Return the SVD; see :class:`Coordinates`."""
        return self._svd.above(floor)

    @cached_property
    def _svd(self) -> SVD:
        return svd_product(self.left.double(), self.right.double(), self.scale)


def coordinates(left: Tensor, right: Tensor, scale: float) -> Whole | Factored:
    """Return scale · left · rightᵀ, (p, r) and (q, r), as factors if they are the smaller."""
    if stays_factored(left.shape[0], right.shape[0], left.shape[1]):
        return Factored(left, right, scale)
    return Whole(product(left.double(), right.double(), scale))


def stays_factored(p: int, q: int, rank: int) -> bool:
    """Tell whether factors (p, rank) and (q, rank) have fewer entries than their product."""
    return rank * (p + q) < p * q


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale · left · rightᵀ, and zeros where only rounding is left of terms that cancel.

    A zero task vector must be one: methods normalise task vectors and count them.

    Args:
        left: (p, r) float64.
        right: (q, r) float64.
        scale: The factor.
    """
    found = (left * scale) @ right.T
    whole = float(torch.linalg.vector_norm(found)) > CANCELLED * _terms(left, right, scale)
    return found if whole else torch.zeros_like(found)


def svd_product(left: Tensor, right: Tensor, scale: float) -> SVD:
    """Return the SVD of scale · left · rightᵀ, without forming the product.

    By QR of both factors and an SVD of r × r. Column by column, QR has the precision of float64, so
    the result is as good as the SVD of the product; :func:`starmerge_models.spectral.svd_factored`,
    by Gram matrices, loses directions below 1e-7 of the largest. Where only rounding is left of
    terms that cancel there are no triplets, as :func:`product` is zero there.

    Cost: O((p + q)r² + r³), against O(pq·min(p, q)) for the product.

    Args:
        left: (p, r) float64, r ≤ p.
        right: (q, r) float64, r ≤ q.
        scale: The factor.

    Returns:
        All r triplets, or none.
    """
    Q_left, R_left = torch.linalg.qr(ready(left))
    Q_right, R_right = torch.linalg.qr(ready(right))
    core = (R_left * scale) @ R_right.T
    whole = float(torch.linalg.vector_norm(core)) > CANCELLED * _terms(left, right, scale)
    P, S, Qh = torch.linalg.svd(core)
    return SVD(Q_left @ P, S, Q_right @ Qh.T).first(len(S) if whole else 0)


def svd_product_bytes(p: int, q: int, rank: int) -> int:
    """Return the bytes at the peak of :func:`svd_product`, its result included.

    The factors in float64, the bases Q, the vectors, and LAPACK's copy of one; r × r besides.
    """
    return 8 * rank * (3 * (p + q) + max(p, q)) + 8 * 4 * rank**2 + svd_bytes(rank, rank)


def _terms(left: Tensor, right: Tensor, scale: float) -> float:
    """Return the sum of the norms of the terms of scale · left · rightᵀ."""
    sizes = torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=0)
    return abs(scale) * float(sizes.sum())
