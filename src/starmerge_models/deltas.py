"""Deltas: the change of one tensor by a fine-tune, as an operator rather than an array.

A :class:`LowRank` delta keeps the form ``scale · B @ A``: its norms, inner products and singular
values are computed from Gram matrices of its factors, in float64, without forming the product. A
:class:`Dense` delta is a full tensor; that of a stored fine-tune (:class:`Stored`) is a lazy
difference, computed on each access. Sums of low-rank deltas stay low-rank.

Tensors with more or fewer than two dimensions are treated as the matrix (first dimension, product
of the others): convolution kernels as (out, in·k), a vector of n entries as (n, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

from starmerge_models.device import ready
from starmerge_models.errors import StarmergeError, UsageError


@dataclass(frozen=True, eq=False)
class Core:
    """A low-rank delta in orthonormal bases: δ = (B @ left) @ matrix @ (right @ A)."""

    matrix: Tensor
    """(p, q) float64; its singular values are those of the delta."""
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
        UsageError: The factors do not fit together.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise UsageError(
                f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} are no factors of a matrix."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.B.device

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

        An entry does not depend on the choice of rows, the threads or the machine, except for very
        rare ties in the rounding. So thresholds and signs are the same in every pass.
        """
        return (self.B[rows].double() @ self.A.double() * self.scale).float()

    def is_finite(self) -> bool:
        """Tell whether the factors and the scale have neither a NaN nor an infinity."""
        return is_finite(self.B) and is_finite(self.A) and math.isfinite(self.scale)

    def is_zero(self) -> bool:
        """Tell whether a factor or the scale is zero."""
        return not (self.B.any() and self.A.any() and self.scale != 0)

    def add(self, other: Delta) -> Delta:
        """Return δ + other: low-rank if both are, else dense."""
        return total([self, other])

    def inner(self, other: Delta) -> float:
        """Return the Frobenius inner product ⟨δ, other⟩ = tr(δᵀ other).

        Raises:
            UsageError: Their shapes differ.
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

        Computed from the float64 Gram matrices BᵀB and AAᵀ (r, r); O((m + n)r²). Directions of a
        factor that may be rounding are dropped: those below √(√m·eps) of the largest, with m its
        longer side, which is 1.2e-7 for m = 4096. The same precision applies to factors that nearly
        cancel.

        Raises:
            StarmergeError: A factor or the scale has a NaN, an infinity, or entries so large that
                their squares leave float64's range.
        """
        gram_b, gram_a = _gram(self.B.T), _gram(self.A)
        # Balance the factors first, so that a column of B is not small only because its row of A is
        # large: a sum may concatenate deltas of very different scales.
        b, a = gram_b.diagonal().sqrt(), gram_a.diagonal().sqrt()
        if not math.isfinite(float((b + a).sum()) + self.scale):
            if self.is_finite():
                raise StarmergeError(
                    "The squares of a factor's entries add up to infinity in float64. Divide the "
                    "factor by a power of two, and multiply the scale of the delta by it."
                )
            raise StarmergeError("A factor or the scale of the delta has a NaN or an infinity.")
        alive = (b > 0) & (a > 0)
        balance = torch.where(alive, (a / b).sqrt(), 0.0)
        inverse = torch.where(alive, (b / a).sqrt(), 0.0)
        rows, columns = self.shape
        root_b, left = _orthonormal(gram_b * balance * balance[:, None], rows)
        root_a, right = _orthonormal(gram_a * inverse * inverse[:, None], columns)
        return Core(
            matrix=self.scale * root_b.T @ root_a,
            left=balance[:, None] * left,
            right=(inverse[:, None] * right).T,
        )


@dataclass(frozen=True, eq=False)
class Dense:
    """A delta given as a full tensor.

    Args:
        tensor: Any shape, any floating dtype.
    """

    tensor: Tensor

    @property
    def layout(self) -> tuple[int, ...]:
        """Shape of the tensor itself."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Device of the tensor."""
        return self.tensor.device

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the tensor as a matrix."""
        return matrix_shape(self.layout)

    @property
    def rank(self) -> int:
        """Upper bound of the matrix rank: min(m, n)."""
        return min(self.shape)

    @property
    def matrix(self) -> Tensor:
        """The tensor as a matrix (m, n), in its own dtype."""
        return self.tensor.reshape(self.shape)

    @property
    def stored(self) -> torch.dtype | None:
        """The dtype that a stored fine-tune was rounded to; it determines the rounding noise.

        None for computed deltas.
        """
        return None

    def scaled(self, factor: float) -> Dense:
        """Return ``factor · δ``, in float32 or wider."""
        return Dense(self.tensor.to(compute_dtype(self.dtype)) * factor)

    def to_dense(self) -> Tensor:
        """Return the matrix (m, n) in float32."""
        return self.matrix.to(torch.float32)

    def entries(self, rows: slice = slice(None)) -> Tensor:
        """Return rows of the matrix, (rows, n) float32."""
        return self.matrix[rows].float()

    def is_finite(self) -> bool:
        """Tell whether there is neither a NaN nor an infinity."""
        return is_finite(self.tensor)

    def is_zero(self) -> bool:
        """Tell whether all entries are zero."""
        return not self.tensor.any()

    def add(self, other: Delta) -> Delta:
        """Return δ + other, dense."""
        return total([self, other])

    def inner(self, other: Delta) -> float:
        """Return the Frobenius inner product ⟨δ, other⟩.

        Raises:
            UsageError: Their shapes differ.
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
        values: Tensor = torch.linalg.svdvals(ready(self.matrix.double()))
        return values


class Stored(Dense):
    """The lazy ``factor · Σ c_k (W_k − W_base)`` of stored fine-tuned tensors.

    Each access computes only the requested rows, so the delta takes no memory besides the stored
    tensors, and an average of several is computed by panels that fit into the CPU's cache.

    Args:
        terms: (c_k, W_k) each; the W_k in the shape of the base, any floating dtype.
        base: W_base, any floating dtype.
        factor: Factor of the whole sum.
    """

    def __init__(
        self, terms: Sequence[tuple[float, Tensor]], base: Tensor, factor: float = 1.0
    ) -> None:
        # The dataclass is frozen, like all deltas.
        object.__setattr__(self, "terms", tuple(terms))
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "factor", factor)

    terms: tuple[tuple[float, Tensor], ...]
    base: Tensor
    factor: float

    @property
    def layout(self) -> tuple[int, ...]:
        """Shape of the tensors."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 if one of the tensors is float64."""
        dtypes = [self.base.dtype, *(tuned.dtype for _, tuned in self.terms)]
        return compute_dtype(reduce(torch.promote_types, dtypes))

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.base.device

    @property
    def tensor(self) -> Tensor:
        """The difference in :attr:`dtype`, in the shape of the base; computed on each access."""
        return self._difference(slice(None)).reshape(self.layout)

    @property
    def stored(self) -> torch.dtype | None:
        """See :class:`Dense`; reads all entries of a tensor wider than bfloat16."""
        return (
            _narrowest_dtype(self.terms[0][1])
            if len(self.terms) == 1 and self._is_unscaled
            else None
        )

    def scaled(self, factor: float) -> Stored:
        """Return ``factor · δ``."""
        return Stored(self.terms, self.base, self.factor * factor)

    def entries(self, rows: slice = slice(None)) -> Tensor:
        """Return rows of the matrix, (rows, n) float32."""
        return self._difference(rows).float()

    def is_finite(self) -> bool:
        """Tell whether there is neither a NaN nor an infinity, in the tensors or by overflow."""
        if not math.isfinite(self.factor):
            return False
        # A difference of numbers below half of the largest one cannot overflow.
        small = self._is_unscaled
        for tensor in (self.base, *(tuned for _, tuned in self.terms)):
            exponent, infinite = _largest_exponent(tensor), _EXPONENTS[tensor.dtype][1]
            if exponent == infinite:
                return False
            is_wider = 2 * torch.finfo(tensor.dtype).max < torch.finfo(self.dtype).max
            small &= is_wider or exponent < infinite - (infinite & -infinite)
        return small or is_finite(self.tensor)

    def is_zero(self) -> bool:
        """Tell whether all entries are zero."""
        if len(self.terms) == 1 and self._is_unscaled and self.terms[0][1].dtype == self.base.dtype:
            return torch.equal(self.terms[0][1], self.base)
        return not self.tensor.any()

    @property
    def _is_unscaled(self) -> bool:
        return self.factor == 1 and all(c == 1 for c, _ in self.terms)

    def _difference(self, rows: slice) -> Tensor:
        """Return rows of the matrix in :attr:`dtype`, in a new buffer."""
        shape, dtype = self.shape, self.dtype
        exact = self.base.reshape(shape)[rows].to(dtype)
        result: Tensor | None = None
        for c, tuned in self.terms:
            part = tuned.reshape(shape)[rows].to(dtype, copy=True).sub_(exact)
            if result is None:
                result = part if c == 1 else part.mul_(c)
            else:
                result.add_(part, alpha=c)
        assert result is not None, "there is at least one term"
        return result if self.factor == 1 else result.mul_(self.factor)


Delta: TypeAlias = LowRank | Dense


def total(deltas: Iterable[Delta]) -> Delta:
    """Return the sum of one tensor's deltas, loading one delta at a time.

    A sum of low-rank deltas concatenates their factors, in float32, and has rank Σr. If one delta
    is dense, the sum is dense. A sum of lazy differences of stored tensors is lazy too; other sums
    hold one float32 matrix and one more dense delta at a time.

    Raises:
        UsageError: There is no delta, or their shapes differ.
    """
    low: list[LowRank] = []
    stored: list[Stored] = []
    dense: Tensor | None = None
    shape: tuple[int, int] | None = None
    for delta in deltas:
        if shape is not None and delta.shape != shape:
            raise UsageError(f"The deltas have different shapes: {shape} and {delta.shape}.")
        shape = delta.shape
        if isinstance(delta, LowRank):
            low.append(delta)
        elif isinstance(delta, Stored) and (not stored or delta.base is stored[0].base):
            stored.append(delta)
        elif dense is None:
            dense = delta.matrix.float().clone()
        else:
            dense += delta.matrix
        del delta  # free it before the next one is loaded
    if shape is None:
        raise UsageError("There is no delta to add.")
    if stored and not low and dense is None:
        return _sum_stored(stored)
    if stored or dense is not None:
        dense = torch.zeros(shape, dtype=torch.float32) if dense is None else dense
        if stored:
            dense += _sum_stored(stored).matrix
        for part in low:
            dense.addmm_(part.B.float(), part.A.float(), alpha=part.scale)
        return Dense(dense)
    if len(low) == 1:
        return low[0]
    return _sum_factors(low, shape)


def _sum_factors(parts: Sequence[LowRank], shape: tuple[int, int]) -> LowRank:
    """Return the sum of low-rank deltas; no other memory than for its factors is allocated."""
    (m, n), r = shape, sum(part.rank for part in parts)
    # B is built transposed, because concatenating columns of few entries is slow.
    columns = torch.empty(r, m, dtype=torch.float32, device=parts[0].device)
    rows = torch.empty(r, n, dtype=torch.float32, device=parts[0].device)
    start = 0
    for part in parts:
        own = slice(start, start := start + part.rank)
        columns[own].copy_(part.B.T).mul_(part.scale)
        rows[own] = part.A
    return LowRank(columns.T, rows)


def _sum_stored(parts: Sequence[Stored]) -> Stored:
    if len(parts) == 1:
        return parts[0]
    terms = [(part.factor * c, tuned) for part in parts for c, tuned in part.terms]
    return Stored(terms, parts[0].base)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a floating tensor has neither a NaN nor an infinity.

    NaN and infinity are the numbers whose exponent bits are all 1. The test is 20 times as fast as
    ``torch.isfinite(tensor).all()``.
    """
    return _largest_exponent(tensor) < _EXPONENTS[tensor.dtype][1]


def _largest_exponent(tensor: Tensor) -> int:
    """Return the largest exponent, as bits in place; computed in pieces that fit into the cache."""
    integers, exponent = _EXPONENTS[tensor.dtype]
    bits = tensor.reshape(-1).view(integers)
    return max(
        (
            int((bits[start : start + _PIECE] & exponent).amax())
            for start in range(0, bits.numel(), _PIECE)
        ),
        default=0,
    )


_EXPONENTS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
"""For each dtype the integer dtype of the same width and the mask of the exponent."""

_PIECE = 2**18


def _narrowest_dtype(tuned: Tensor) -> torch.dtype:
    """Return the narrowest dtype that holds all values; files often have a wider dtype."""
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        if torch.finfo(narrow).eps > torch.finfo(tuned.dtype).eps and torch.equal(
            tuned, tuned.to(narrow).to(tuned.dtype)
        ):
            return narrow
    return tuned.dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (m, n) of a tensor's shape as a matrix: (first dimension, product of the others)."""
    if not shape:
        return 1, 1
    return shape[0], math.prod(shape[1:])


def _check_same_shape(first: Delta, second: Delta) -> None:
    if first.shape != second.shape:
        raise UsageError(f"The deltas have different shapes: {first.shape} and {second.shape}.")


def _gram(X: Tensor) -> Tensor:
    """Return X Xᵀ (r, r) for X (r, length) in float64.

    The last digits depend on the number of BLAS threads; the workers of a merge use one each.
    """
    exact = X.double()
    return exact @ exact.T


def _orthonormal(gram: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Factor G = XᵀX for X (length, r) as G = root @ rootᵀ with X @ inverse orthonormal.

    Returns:
        root (r, p) and inverse (r, p), such that X = (X @ inverse) @ rootᵀ; p is the rank.
    """
    values, vectors = torch.linalg.eigh(ready(gram))
    # Rounding errors of a sum of `length` products grow like a random walk. Measured eigenvalues of
    # zero directions reach 0.14·√length·eps for every r, and 1·eps for short sums.
    noise = max(16.0, math.sqrt(length)) * torch.finfo(gram.dtype).eps
    rank = int((values > noise * values[-1:]).sum())  # they ascend
    sigma, kept = values[len(values) - rank :].sqrt(), vectors[:, len(values) - rank :]
    return kept * sigma, kept / sigma
