"""Coordinates of a task vector in Core Space: the matrix C_t, or factors of it."""

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
"""A product of factors of at most this share of its terms is rounding, and treated as zero."""


class Coordinates(Protocol):
    """C_t (p, q) of one task vector, stored as a matrix or as factors."""

    @property
    def matrix(self) -> Tensor:
        """C_t, (p, q) float64."""

    @property
    def norm(self) -> float:
        """The Frobenius norm ‖C_t‖."""

    @property
    def is_zero(self) -> bool:
        """Whether C_t is zero or only rounding."""

    def svd(self, floor: float) -> SVD:
        """Return the SVD without the triplets of σ ≤ ``floor``.

        The SVD is computed once and cached in this object.
        """


@dataclass(frozen=True, eq=False)
class MatrixCoordinates:
    """C_t stored as a matrix."""

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
class FactoredCoordinates:
    """C_t = scale · left · rightᵀ; the matrix is computed on each access."""

    left: Tensor
    """(p, r), any floating dtype."""
    right: Tensor
    """(q, r), any floating dtype."""
    scale: float

    @property
    def matrix(self) -> Tensor:
        """See :class:`Coordinates`; computed on each access, by :func:`product`."""
        return product(self.left.double(), self.right.double(), self.scale)

    @cached_property
    def norm(self) -> float:
        """See :class:`Coordinates`; computed from the SVD."""
        return float(torch.linalg.vector_norm(self._svd.S))

    @property
    def is_zero(self) -> bool:
        """See :class:`Coordinates`; computed from the SVD."""
        return not self._svd.S.any()

    def svd(self, floor: float) -> SVD:
        """Return the SVD; see :class:`Coordinates`."""
        return self._svd.above(floor)

    @cached_property
    def _svd(self) -> SVD:
        return svd_product(self.left.double(), self.right.double(), self.scale)


def coordinates(
    left: Tensor, right: Tensor, scale: float
) -> MatrixCoordinates | FactoredCoordinates:
    """Return scale · left · rightᵀ, (p, r) and (q, r), as factors if these have fewer entries."""
    if stays_factored(left.shape[0], right.shape[0], left.shape[1]):
        return FactoredCoordinates(left, right, scale)
    return MatrixCoordinates(product(left.double(), right.double(), scale))


def stays_factored(p: int, q: int, rank: int) -> bool:
    """Return whether factors (p, rank) and (q, rank) have fewer entries than their product."""
    return rank * (p + q) < p * q


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale · left · rightᵀ; exactly zero if its terms cancel up to rounding.

    A zero task vector must be exactly zero, because methods normalise and count task vectors.

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

    Computed by QR of both factors and an SVD of r × r. QR has the precision of float64 in each
    column, so the result is as accurate as the SVD of the product;
    :func:`starmerge_models.spectral.svd_factored` uses Gram matrices and loses directions below
    1e-7 of the largest. If the terms cancel up to rounding, so that :func:`product` is zero, there
    are no triplets.

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
    """Return the peak bytes of :func:`svd_product`, including its result.

    They are the factors in float64, the bases Q, the vectors, LAPACK's copy of one factor, and
    matrices of r × r.
    """
    return 8 * rank * (3 * (p + q) + max(p, q)) + 8 * 4 * rank**2 + svd_bytes(rank, rank)


def _terms(left: Tensor, right: Tensor, scale: float) -> float:
    """Return the sum of the norms of the terms of scale · left · rightᵀ."""
    sizes = torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=0)
    return abs(scale) * float(sizes.sum())
