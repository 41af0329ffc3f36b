"""Deltas: what a fine-tune changed in one tensor, as an operator rather than an array.

A :class:`LowRank` delta is ``scale · B @ A`` and stays so: its norms, inner products and singular
values are computed from Gram matrices of its factors, in float64, without forming the product. A
:class:`Dense` delta is the difference of two full tensors. Sums of low-rank deltas stay low-rank.

A tensor of more or fewer than two dimensions counts as the matrix (first dimension, all others):
convolution kernels as (out, in·k), a vector of n entries as (n, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Core:
    """A low-rank delta in orthonormal bases of its own: δ = (B @ left) @ matrix @ (right @ A)."""

    matrix: Tensor
    """(p, q) float64; has the singular values of the delta."""
    left: Tensor
    """(r, p) float64; B @ left has orthonormal columns."""
    right: Tensor
    """(q, r) float64; right @ A has orthonormal rows."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """The delta ``scale · B @ A`` of a matrix (m, n).

    Args:
        B: (m, r), any floating dtype.
        A: (r, n), any floating dtype.
        scale: The factor s; for a LoRA adapter alpha/r, or alpha/√r with rsLoRA.

    Raises:
        ValueError: The factors do not fit together.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} are no factors of a matrix."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of B: an upper bound of the matrix rank."""
        return self.B.shape[1]

    def scaled(self, factor: float) -> LowRank:
        """Return ``factor · δ``."""
        return LowRank(self.B, self.A, self.scale * factor)

    def to_dense(self) -> Tensor:
        """Return the matrix (m, n) in float32."""
        return torch.mm(self.B.float() * self.scale, self.A.float())

    def entries(self, rows: slice = slice(None)) -> Tensor:
        """Return rows of the matrix, (rows, n) float32: the float64 product, rounded once.

        Other rows, other threads, another machine: but for the rarest ties of the second rounding
        an entry is the same, so that thresholds and signs decide alike wherever they are looked at.
        """
        return (self.B[rows].double() @ self.A.double() * self.scale).float()

    def add(self, other: Delta) -> Delta:
        """Return δ + other: low-rank if both are, else dense."""
        return total([self, other])

    def inner(self, other: Delta) -> float:
        """Return the Frobenius inner product ⟨δ, other⟩ = tr(δᵀ other).

        Raises:
            ValueError: Their shapes differ.
        """
        if isinstance(other, Dense):
            return other.inner(self)
        _check_same_shape(self, other)
        left = self.B.double().T @ other.B.double()
        right = self.A.double() @ other.A.double().T
        return self.scale * other.scale * float((left * right).sum())

    def frobenius(self) -> float:
        """Return the Frobenius norm ‖δ‖."""
        return float(torch.linalg.vector_norm(self.core().matrix))

    def nuclear(self) -> float:
        """Return the nuclear norm Σσ."""
        return float(self.singular_values().sum())

    def singular_values(self) -> Tensor:
        """Return the nonzero singular values (k,), float64, descending; k ≤ rank."""
        values: Tensor = torch.linalg.svdvals(self.core().matrix)
        return values

    def core(self) -> Core:
        """Return the delta in orthonormal bases of its column and row space.

        From the float64 Gram matrices BᵀB and AAᵀ (r, r); O((m + n)r²). Directions of a factor
        that rounding may have made are left out: those below √(√m·eps) of the largest, with m its
        longer side, which is 1.2e-7 for m = 4096. Factors that nearly cancel lose as many digits.

        Raises:
            ValueError: A factor or the scale has a NaN or an infinity.
        """
        B, A = self.B.double(), self.A.double()
        if not (B.isfinite().all() and A.isfinite().all() and math.isfinite(self.scale)):
            raise ValueError("A factor or the scale of the delta has a NaN or an infinity.")
        # Balance the factors first, so that a column of B is never small only because its row of
        # A is large: deltas of very different scales may stand side by side in one sum.
        b, a = torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(A, dim=1)
        alive = (b > 0) & (a > 0)
        balance = torch.where(alive, (a / b).sqrt(), 0.0)
        inverse = torch.where(alive, (b / a).sqrt(), 0.0)
        rows, columns = self.shape
        root_b, left = _orthonormal((B.T @ B) * balance * balance[:, None], rows)
        root_a, right = _orthonormal((A @ A.T) * inverse * inverse[:, None], columns)
        return Core(
            matrix=self.scale * root_b.T @ root_a,
            left=balance[:, None] * left,
            right=(inverse[:, None] * right).T,
        )


@dataclass(frozen=True, eq=False)
class Dense:
    """The delta of a full fine-tune, stored entry by entry.

    Args:
        tensor: Any shape, any floating dtype.
        stored: The dtype that the fine-tune was rounded to, if the delta is as it came from its
            file: what tells how much of it is rounding. None for what was computed.
    """

    tensor: Tensor
    stored: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the tensor as a matrix."""
        return matrix_shape(self.tensor.shape)

    @property
    def rank(self) -> int:
        """Upper bound of the matrix rank: min(m, n)."""
        return min(self.shape)

    @property
    def matrix(self) -> Tensor:
        """The tensor as a matrix (m, n), in its own dtype."""
        return self.tensor.reshape(self.shape)

    def scaled(self, factor: float) -> Dense:
        """Return ``factor · δ``, in float32 or wider."""
        return Dense(self.tensor.to(wide(self.tensor.dtype)) * factor)

    def to_dense(self) -> Tensor:
        """Return the matrix (m, n) in float32."""
        return self.matrix.to(torch.float32)

    def entries(self, rows: slice = slice(None)) -> Tensor:
        """Return rows of the matrix, (rows, n) float32."""
        return self.matrix[rows].float()

    def add(self, other: Delta) -> Delta:
        """Return δ + other, dense."""
        return total([self, other])

    def inner(self, other: Delta) -> float:
        """Return the Frobenius inner product ⟨δ, other⟩.

        Raises:
            ValueError: Their shapes differ.
        """
        _check_same_shape(self, other)
        if isinstance(other, LowRank):
            product = (self.matrix.double() @ other.A.double().T) * other.B.double()
            return other.scale * float(product.sum())
        return float((self.matrix.double() * other.matrix.double()).sum())

    def frobenius(self) -> float:
        """Return the Frobenius norm ‖δ‖."""
        return float(torch.linalg.vector_norm(self.tensor, dtype=torch.float64))

    def nuclear(self) -> float:
        """Return the nuclear norm Σσ."""
        return float(self.singular_values().sum())

    def singular_values(self) -> Tensor:
        """Return the singular values (min(m, n),), float64, descending."""
        values: Tensor = torch.linalg.svdvals(self.matrix.double())
        return values


Delta: TypeAlias = LowRank | Dense


def total(deltas: Iterable[Delta]) -> Delta:
    """Return the sum of one tensor's deltas, taking them one at a time.

    Low-rank deltas are summed by putting their factors side by side, in float32, at rank Σr. As
    soon as one delta is dense, the sum is a dense float32 matrix, and only one more dense delta is
    held beside it.

    Raises:
        ValueError: There is no delta, or their shapes differ.
    """
    low: list[LowRank] = []
    dense: Tensor | None = None
    shape: tuple[int, int] | None = None
    for delta in deltas:
        if shape is not None and delta.shape != shape:
            raise ValueError(f"The deltas have different shapes: {shape} and {delta.shape}.")
        shape = delta.shape
        if isinstance(delta, LowRank):
            low.append(delta)
        elif dense is None:
            dense = delta.matrix.float().clone()
        else:
            dense += delta.matrix
        del delta  # or it would stand beside the next one
    if shape is None:
        raise ValueError("There is no delta to add.")
    if dense is not None:
        for part in low:
            dense.addmm_(part.B.float(), part.A.float(), alpha=part.scale)
        return Dense(dense)
    if len(low) == 1:
        return low[0]
    return LowRank(
        torch.cat([part.B.float() * part.scale for part in low], dim=1),
        torch.cat([part.A.float() for part in low], dim=0),
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (m, n) of a tensor's shape as a matrix: (first dimension, product of the others)."""
    if not shape:
        return 1, 1
    return shape[0], math.prod(shape[1:])


def _check_same_shape(first: Delta, second: Delta) -> None:
    if first.shape != second.shape:
        raise ValueError(f"The deltas have different shapes: {first.shape} and {second.shape}.")


def _orthonormal(gram: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Factor G = XᵀX of some X (length, r) as G = root @ rootᵀ with X @ inverse orthonormal.

    Returns:
        root (r, p) and inverse (r, p), such that X = (X @ inverse) @ rootᵀ; p is the rank.
    """
    values, vectors = torch.linalg.eigh(gram)
    # Rounding errors of a sum of `length` products add up like a walk; measured eigenvalues of
    # directions that are not there reach 0.14·√length·eps, whatever r, and 1·eps in small ones.
    noise = max(16.0, math.sqrt(length)) * torch.finfo(gram.dtype).eps
    kept = values > noise * values.max() if len(values) else values > 0
    sigma = values[kept].sqrt()
    return vectors[:, kept] * sigma, vectors[:, kept] / sigma
