"""Core Space: the task vectors of one tensor in common orthonormal bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank
from starmerge_models.device import CPU, is_large, ready, run
from starmerge_models.errors import UsageError
from starmerge_models.spectral.coordinates import (
    Coordinates,
    FactoredCoordinates,
    MatrixCoordinates,
    coordinates,
    stays_factored,
    svd_product_bytes,
)
from starmerge_models.spectral.dense import svd_bytes
from starmerge_models.spectral.metric import Whitening

_T = TypeVar("_T")

FLOAT64_NOISE = 1e-10
"""Generous bound of the error of a singular value in float64, as a share of the norm."""

FLOAT32_NOISE = 1e-6
"""The same for deltas whose entries were rounded to float32: about 2⁻²⁴ for every size."""


@dataclass(frozen=True, eq=False)
class CoreSpace:
    """Matrices τ_t = U C_t Vᵀ; a rotation-equivariant method only needs the C_t.

    Source: arXiv 2509.17786. The bases span the columns of all B_t and the rows of all A_t, so the
    representation is exact. If the total rank of the deltas exceeds the number of rows or columns,
    as for most dense deltas, this side keeps its original coordinates. Low-rank deltas are stored
    as factors until a method reads a matrix.
    """

    tasks: list[Coordinates]
    """C_t, (p, q) each."""
    shape: tuple[int, int]
    """(m, n) of the deltas themselves."""
    U: Tensor | None
    """(m, p) float64, orthonormal columns; None for the original coordinates, p = m."""
    V: Tensor | None
    """(n, q) float64, orthonormal columns; None for the original coordinates, q = n."""
    noise: float
    """Singular values below this share of the task vectors' norms are rounding."""
    home: torch.device = CPU
    """Device of the deltas; the matrices and bases may be on another device."""
    whitening: Whitening | None = None
    """The whitening that was applied to the deltas, which :meth:`delta` and :meth:`product` invert;
    on the device of the matrices."""

    @property
    def matrices(self) -> list[Tensor]:
        """C_t, (p, q) float64 each; products of factors are computed on each access."""
        return [C.matrix for C in self.tasks]

    def as_matrices(self) -> CoreSpace:
        """Return the same space with all factors multiplied once, for repeated access."""
        return replace(self, tasks=[MatrixCoordinates(matrix) for matrix in self.matrices])

    @property
    def floor(self) -> float:
        """Upper bound of singular values that are rounding, in C_t and their sums and differences.

        It is :attr:`noise` times the sum of the task vectors' Frobenius norms.
        """
        return self.noise * sum(C.norm for C in self.tasks)

    def delta(self, matrix: Tensor) -> Delta:
        """Transform a matrix (p, q) of this space back to a delta (m, n), rounded to float32 once.

        The rank of the delta is min(p, q); it is dense if that is m or n. The result is on the
        device of the deltas.
        """
        if matrix.shape[0] <= matrix.shape[1]:
            right = matrix if self.V is None else matrix @ self.V.T
            return self._stored(Dense(right) if self.U is None else LowRank(self.U, right))
        left = matrix if self.U is None else self.U @ matrix
        return self._stored(Dense(left) if self.V is None else LowRank(left, self.V.T))

    def _stored(self, delta: Delta) -> Delta:
        if self.whitening is not None:
            delta = self.whitening.restore(delta)
        if isinstance(delta, LowRank):
            return LowRank(delta.B.float().to(self.home), delta.A.float().to(self.home))
        return Dense(delta.tensor.float().to(self.home))

    def product(self, left: Tensor, right: Tensor) -> Delta:
        """Transform left · rightᵀ, (p, r) and (q, r), back to a delta (m, n) of rank r.

        It is rounded to float32 once, and dense if r is m or n. The result is on the device of the
        deltas.
        """
        if left.shape[1] >= min(self.shape):
            return self.delta(left @ right.T)
        B = left if self.U is None else self.U @ left
        A = right if self.V is None else self.V @ right
        return self._stored(LowRank(B, A.T))


def on_best_device(
    deltas: Sequence[Delta], work: Callable[[torch.device], _T], *, beside: int = 0
) -> _T:
    """Return ``work(device)`` for the best device to merge one tensor's deltas in Core Space.

    The GPU is used if a delta is dense and the matrix large. Adapters, whose matrices in Core Space
    are small, stay on their device. See :func:`starmerge_models.device.run`.

    Args:
        deltas: One or more, of one shape.
        work: Function that calls :func:`core_space` with the device. It must create tensors on the
            device of the matrices (``C.new_zeros``, ``torch.zeros_like``), and return a result on
            the device of the deltas or on the CPU.
        beside: Bytes that the work takes in addition to other merges of such deltas.
    """
    is_dense = any(isinstance(delta, Dense) for delta in deltas)
    shape = deltas[0].shape
    need = beside + _need(shape, len(deltas)) if is_dense and is_large(shape) else None
    return run(work, home=deltas[0].device, need=need)


def _need(shape: tuple[int, int], count: int) -> int:
    """Return an approximate bound of the bytes for merging ``count`` dense deltas.

    For 1024² and four deltas the measured peaks of all methods on the CPU were 13 (``iso_c``) to 39
    float64 matrices (``iso_cts``); the bound is 40. ``covariance`` and ``ace`` allocate square
    matrices of either side.
    """
    m, n = shape
    return 8 * ((4 * count + 16) * m * n + 8 * max(m, n) ** 2)


def core_space(
    deltas: Sequence[Delta],
    device: torch.device | None = None,
    whitening: Whitening | None = None,
) -> CoreSpace:
    """Transform deltas of one shape into common orthonormal bases, exact to float64.

    Computed by QR of the concatenated factors. Cost: O((m + n)R²) for a total rank R. If one of the
    deltas is dense, all stay full matrices.

    Args:
        deltas: One or more.
        device: Device of the matrices and bases; by default that of the deltas.
        whitening: A whitening to apply to the deltas first.

    Raises:
        UsageError: There is no delta, or their shapes differ.
    """
    shapes = {delta.shape for delta in deltas}
    if len(shapes) != 1:
        raise UsageError(f"The deltas have no common shape: {sorted(shapes)}.")
    m, n = next(iter(shapes))
    home = deltas[0].device
    device = home if device is None else device
    # The noise is that before whitening, which does not change the precision of entries: it scales
    # rounding, which lies in all directions, by √c, and task vectors by at least √(ρc).
    noise = max(map(_noise, deltas))
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    if whitening is not None:
        whitening = whitening.to(device)
    U: Tensor | None = None
    V: Tensor | None = None
    tasks: list[Coordinates]
    if len(low) == len(deltas):
        low = [_on_device(delta, device, whitening) for delta in low]
        U, lefts = _common_basis([delta.B for delta in low])
        V, rights = _common_basis([delta.A.T for delta in low])
        tasks = [
            coordinates(left, right, delta.scale)
            for left, right, delta in zip(lefts, rights, low, strict=True)
        ]
    elif _spans_subspace((m, n), len(deltas)):
        matrices = [_coordinates(delta, device, whitening).matrix for delta in deltas]
        if m > n:
            U, lefts = _common_basis(matrices)
            tasks = [MatrixCoordinates(left) for left in lefts]
        else:
            V, rights = _common_basis([matrix.T for matrix in matrices])
            tasks = [MatrixCoordinates(right.T) for right in rights]
    else:
        tasks = [_coordinates(delta, device, whitening) for delta in deltas]
    return CoreSpace(tasks, (m, n), U, V, noise, home, whitening)


def _spans_subspace(shape: tuple[int, int], count: int) -> bool:
    """Return whether the longer sides of some matrices only span a subspace."""
    return count * min(shape) < max(shape)


@dataclass(frozen=True)
class CoreShape:
    """Sizes of a :class:`CoreSpace`, known before it is computed."""

    shape: tuple[int, int]
    """(m, n) of the deltas."""
    p: int
    """Rows of the C_t."""
    q: int
    """Columns of the C_t."""
    ranks: tuple[int, ...]
    """Upper bound of the rank of each matrix."""
    factored: tuple[bool, ...]
    """Whether each C_t is stored as factors."""
    bases: int
    """Bytes of the bases."""
    nbytes: int
    """Bytes of the space: matrices, factors and bases."""
    construction_bytes: int
    """Peak bytes of computing the space, including the space itself."""
    is_whitened: bool

    @property
    def count(self) -> int:
        """Number of the matrices."""
        return len(self.ranks)

    @property
    def size(self) -> int:
        """Bytes of one of the matrices, 8pq."""
        return 8 * self.p * self.q

    @property
    def vectors(self) -> int:
        """Bytes of all singular vectors of one of the matrices."""
        return 8 * min(self.p, self.q) * (self.p + self.q)

    @property
    def svds(self) -> int:
        """Bytes of the SVDs of all C_t, computed from factors if stored as factors."""
        return sum(8 * r * (self.p + self.q + 1) for r in self._triplets)

    @property
    def svd_peak_bytes(self) -> int:
        """Peak bytes of computing the largest of these SVDs."""
        needs = (
            svd_product_bytes(self.p, self.q, r) if of_factors else svd_bytes(self.p, self.q)
            for r, of_factors in zip(self.ranks, self.factored, strict=True)
        )
        return max(needs)

    @property
    def _triplets(self) -> list[int]:
        """Number of triplets in the SVD of each C_t."""
        pairs = zip(self.ranks, self.factored, strict=True)
        return [r if of_factors else min(self.p, self.q) for r, of_factors in pairs]

    def as_matrices(self) -> CoreShape:
        """Return the sizes of :meth:`CoreSpace.as_matrices`, whose peak includes this space."""
        more = sum(self.factored) * self.size
        # The factors are freed, the bases are kept.
        making = max(self.construction_bytes, self.nbytes + more)
        kept = self.bases + self.count * self.size
        none = (False,) * self.count
        return replace(self, factored=none, nbytes=kept, construction_bytes=making)

    @property
    def rank(self) -> int | None:
        """The rank of the result of :meth:`CoreSpace.delta`; None if it is dense."""
        m, n = self.shape
        if self.p <= self.q:
            return None if self.p == m else self.p
        return None if self.q == n else self.q

    @property
    def result(self) -> int:
        """Bytes of the float32 delta (m, n) that :meth:`CoreSpace.delta` returns."""
        m, n = self.shape
        return 4 * m * n if self.rank is None else 4 * self.rank * (m + n)

    @property
    def result_peak_bytes(self) -> int:
        """Peak bytes of :meth:`CoreSpace.delta`, including its argument.

        They are the factors, or the matrix, in float64 and in float32. Inverting a whitening in
        float64 takes a copy, a triangular solve, and a QR of the factor.
        """
        return self.size + (10 if self.is_whitened else 3) * self.result


def core_shape(
    shape: tuple[int, int],
    ranks: Sequence[int | None],
    *,
    width: int = 4,
    is_whitened: bool = False,
) -> CoreShape:
    """Return the sizes of the :func:`core_space` of some deltas.

    Args:
        shape: (m, n) of the deltas.
        ranks: Ranks of one or more deltas; None for a dense delta.
        width: Bytes of an entry of a dense delta when it is read, 4 or 8.
        is_whitened: Whether a whitening is applied to the deltas.
    """
    m, n = shape
    count = len(ranks)
    own = tuple(min(m, n) if rank is None else min(rank, m, n) for rank in ranks)
    R = sum(rank or 0 for rank in ranks)
    # Whitening converts factors to float64; other factors are held by the caller.
    waiting = 8 * R * (m + n) if is_whitened else 0
    if None not in ranks:
        p, q = min(R, m), min(R, n)
        factored = tuple(stays_factored(p, q, r) for r in own)
        products = 8 * p * q * factored.count(False)
        # For a side with a basis, in float64: the factors, their concatenation, LAPACK's copy, Q
        # and R. B is processed while the factors of A wait, then A beside the results for B.
        (left, left_making), (right, right_making) = (
            (8 * R * side + 8 * R * R, 32 * R * side + 8 * R * R) if side > R else (0, 0)
            for side in (m, n)
        )
        bases = 8 * R * ((m if m > R else 0) + (n if n > R else 0))
        kept = waiting + left + right
        making = max(waiting + max(left_making, left + right_making), kept + products)
        nbytes = (kept if any(factored) else bases) + products
        return CoreShape(shape, p, q, own, factored, bases, nbytes, making, is_whitened)
    # The last delta is still to be widened, with its base; whitening adds two float64 copies.
    widening = (2 * width + (16 if is_whitened else 0)) * m * n
    if not _spans_subspace(shape, count):
        factored = tuple(rank is not None and stays_factored(m, n, rank) for rank in ranks)
        nbytes = waiting + 8 * m * n * factored.count(False)
        making = nbytes + widening
        return CoreShape(shape, m, n, own, factored, 0, nbytes, making, is_whitened)
    # Few oblong matrices: their concatenation, LAPACK's copy, and the basis Q.
    matrices, side = 8 * count * m * n, count * min(m, n)
    p, q = (side, n) if m > n else (m, side)
    kept = matrices + 8 * count * p * q
    making = max(matrices + widening, 4 * matrices)
    return CoreShape(shape, p, q, own, (False,) * count, matrices, kept, making, is_whitened)


def _common_basis(factors: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """Return an orthonormal basis (m, p) of all columns, and the factors (p, r_t) in this basis.

    If the factors together have at least as many columns as rows, return None and the factors
    unchanged.
    """
    ranks = [factor.shape[1] for factor in factors]
    if sum(ranks) >= factors[0].shape[0]:
        return None, list(factors)
    Q, R = torch.linalg.qr(ready(torch.cat([factor.double() for factor in factors], dim=1)))
    return Q, list(R.split(ranks, dim=1))


def _coordinates(
    delta: Delta, device: torch.device, whitening: Whitening | None
) -> MatrixCoordinates | FactoredCoordinates:
    """Return a delta in its original coordinates."""
    if isinstance(delta, LowRank):
        moved = _on_device(delta, device, whitening)
        return coordinates(moved.B, moved.A.T, moved.scale)
    # Copy to the device in the stored width, and convert to float64 on the device.
    matrix = delta.matrix.to(device)
    return MatrixCoordinates(
        matrix.double() if whitening is None else whitening.whiten(Dense(matrix)).matrix
    )


def _on_device(delta: LowRank, device: torch.device, whitening: Whitening | None) -> LowRank:
    moved = LowRank(delta.B.to(device), delta.A.to(device), delta.scale)
    return moved if whitening is None else whitening.whiten(moved)


def _noise(delta: Delta) -> float:
    exact = isinstance(delta, LowRank) or delta.dtype == torch.float64
    return FLOAT64_NOISE if exact else FLOAT32_NOISE
