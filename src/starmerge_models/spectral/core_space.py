"""Core Space: the task vectors of one tensor in common orthonormal bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank
from starmerge_models.device import CPU, is_large, ready, run
from starmerge_models.spectral.coordinates import (
    Coordinates,
    Factored,
    Whole,
    coordinates,
    stays_factored,
    svd_product_bytes,
)
from starmerge_models.spectral.dense import svd_bytes
from starmerge_models.spectral.metric import Whitening

_T = TypeVar("_T")

FLOAT64_NOISE = 1e-10
"""What float64 arithmetic may add to a singular value, and more, as a share of the norm."""

FLOAT32_NOISE = 1e-6
"""The same for deltas whose entries were rounded to float32: about 2⁻²⁴ whatever the size."""


@dataclass(frozen=True, eq=False)
class CoreSpace:
    """Matrices τ_t = U C_t Vᵀ, of which a method that any rotation leaves alone need only see C_t.

    Source: arXiv 2509.17786. The bases span the columns of all B_t and the rows of all A_t, so
    nothing is lost. Deltas whose ranks add up to more than the matrix has rows or columns, as those
    of most dense ones do, stay in the coordinates they have. Low-rank ones keep their factors there
    until a method asks for a matrix.
    """

    tasks: list[Coordinates]
    """C_t, (p, q) each."""
    shape: tuple[int, int]
    """(m, n) of the deltas themselves."""
    U: Tensor | None
    """(m, p) float64, orthonormal columns; None for the coordinates there are, p = m."""
    V: Tensor | None
    """(n, q) float64, orthonormal columns; None for the coordinates there are, q = n."""
    noise: float
    """Singular values below this share of the task vectors' norms are rounding."""
    home: torch.device = CPU
    """Where the deltas lie. The matrices and bases lie on the device that works with them."""
    whitening: Whitening | None = None
    """Brought the deltas into whitened inputs, of which :meth:`delta` and :meth:`product` bring
    their results back; on the device of the matrices."""

    @property
    def matrices(self) -> list[Tensor]:
        """C_t, (p, q) float64 each; those of factors are multiplied out at each look."""
        return [C.matrix for C in self.tasks]

    def whole(self) -> CoreSpace:
        """Return the same space with all matrices multiplied out, for who looks at them often."""
        return replace(self, tasks=[Whole(matrix) for matrix in self.matrices])

    @property
    def floor(self) -> float:
        """Singular values of the C_t, of their sums and differences that are at most this are zero.

        :attr:`noise` times the sum of the task vectors' Frobenius norms.
        """
        return self.noise * sum(C.norm for C in self.tasks)

    def delta(self, matrix: Tensor) -> Delta:
        """Return what a matrix (p, q) of this space is as a delta (m, n), rounded to float32 once.

        The shorter of p and q becomes the rank; a delta is dense if that is m or n. It lies where
        the deltas do, whatever device the matrix is on.
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
        """Return what left · rightᵀ, (p, r) and (q, r), is as a delta (m, n) of rank r.

        It is rounded to float32 once, and dense if r is m or n. It lies where the deltas do.
        """
        if left.shape[1] >= min(self.shape):
            return self.delta(left @ right.T)
        B = left if self.U is None else self.U @ left
        A = right if self.V is None else self.V @ right
        return self._stored(LowRank(B, A.T))


def on_best_device(
    deltas: Sequence[Delta], work: Callable[[torch.device], _T], *, beside: int = 0
) -> _T:
    """Return ``work(device)`` for the device on which to merge one tensor's deltas in Core Space.

    That is the card where one of them is dense and the matrix large. Adapters, whose matrices in
    Core Space are small, stay where they are. See :func:`starmerge_models.device.run`.

    Args:
        deltas: One or more, of one shape.
        work: Calls :func:`core_space` with the device. All that it makes on it, it makes of the
            matrices there (``C.new_zeros``, ``torch.zeros_like``), and what it returns lies where
            the deltas do, or on the CPU.
        beside: Bytes that the work takes besides what merges of such deltas take.
    """
    is_dense = any(isinstance(delta, Dense) for delta in deltas)
    shape = deltas[0].shape
    need = beside + _need(shape, len(deltas)) if is_dense and is_large(shape) else None
    return run(work, home=deltas[0].device, need=need)


def _need(shape: tuple[int, int], count: int) -> int:
    """Return the bytes that merging ``count`` dense deltas takes, more or less.

    At 1024² and four deltas the peaks of memory of all methods on the CPU were 13 (``iso_c``) to 39
    matrices (``iso_cts``) of float64; here it is 40. ``covariance`` and ``ace`` make square ones
    of either side.
    """
    m, n = shape
    return 8 * ((4 * count + 16) * m * n + 8 * max(m, n) ** 2)


def core_space(
    deltas: Sequence[Delta],
    device: torch.device | None = None,
    whitening: Whitening | None = None,
) -> CoreSpace:
    """Bring deltas of one shape into common orthonormal bases, exactly to float64.

    By QR of the factors side by side. Cost: O((m + n)R²) for a total rank R, against the matrices
    themselves if one of the deltas is dense.

    Args:
        deltas: One or more.
        device: Where the matrices and bases are to lie; by default where the deltas do.
        whitening: Brings the deltas into whitened inputs first.

    Raises:
        ValueError: There is no delta, or their shapes differ.
    """
    shapes = {delta.shape for delta in deltas}
    if len(shapes) != 1:
        raise ValueError(f"The deltas have no common shape: {sorted(shapes)}.")
    m, n = next(iter(shapes))
    home = deltas[0].device
    device = home if device is None else device
    # Of the deltas as they came: how well their entries are known, whitening does not change. It
    # multiplies rounding, which lies in all directions, by √c, and task vectors by √(ρc) at least.
    noise = max(map(_noise, deltas))
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    if whitening is not None:
        whitening = whitening.to(device)
    U: Tensor | None = None
    V: Tensor | None = None
    tasks: list[Coordinates]
    if len(low) == len(deltas):
        low = [_moved(delta, device, whitening) for delta in low]
        U, lefts = _common_basis([delta.B for delta in low])
        V, rights = _common_basis([delta.A.T for delta in low])
        tasks = [
            coordinates(left, right, delta.scale)
            for left, right, delta in zip(lefts, rights, low, strict=True)
        ]
    elif _span_a_part((m, n), len(deltas)):
        matrices = [_coordinates(delta, device, whitening).matrix for delta in deltas]
        if m > n:
            U, lefts = _common_basis(matrices)
            tasks = [Whole(left) for left in lefts]
        else:
            V, rights = _common_basis([matrix.T for matrix in matrices])
            tasks = [Whole(right.T) for right in rights]
    else:
        tasks = [_coordinates(delta, device, whitening) for delta in deltas]
    return CoreSpace(tasks, (m, n), U, V, noise, home, whitening)


def _span_a_part(shape: tuple[int, int], count: int) -> bool:
    """Tell whether the longer sides of some matrices span but a part of their space."""
    return count * min(shape) < max(shape)


@dataclass(frozen=True)
class CoreShape:
    """The sizes of a :class:`CoreSpace` that is not there yet."""

    shape: tuple[int, int]
    """(m, n) of the deltas."""
    p: int
    """Rows of the matrices in it."""
    q: int
    """Columns of them."""
    ranks: tuple[int, ...]
    """Upper bound of the rank of each matrix."""
    factored: tuple[bool, ...]
    """Of which of the matrices there are factors."""
    bases: int
    """Bytes of the bases."""
    nbytes: int
    """Bytes of the matrices, of the factors of others, and of the bases."""
    making: int
    """Bytes at the peak while it is made, of itself too."""
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
        """Bytes of the SVDs of all of them, from factors where there are such."""
        return sum(8 * r * (self.p + self.q + 1) for r in self._triplets)

    @property
    def svd_making(self) -> int:
        """Bytes at the peak while the largest of these SVDs is made."""
        needs = (
            svd_product_bytes(self.p, self.q, r) if of_factors else svd_bytes(self.p, self.q)
            for r, of_factors in zip(self.ranks, self.factored, strict=True)
        )
        return max(needs)

    @property
    def _triplets(self) -> list[int]:
        """Number of the triplets in the SVD of each."""
        pairs = zip(self.ranks, self.factored, strict=True)
        return [r if of_factors else min(self.p, self.q) for r, of_factors in pairs]

    def whole(self) -> CoreShape:
        """Return the sizes of :meth:`CoreSpace.whole`, which is made while this space is held."""
        more = sum(self.factored) * self.size
        # Without the factors, which are let go of; the bases stay.
        making = max(self.making, self.nbytes + more)
        kept = self.bases + self.count * self.size
        none = (False,) * self.count
        return replace(self, factored=none, nbytes=kept, making=making)

    @property
    def rank(self) -> int | None:
        """The rank of what :meth:`CoreSpace.delta` returns; None where it is dense."""
        m, n = self.shape
        if self.p <= self.q:
            return None if self.p == m else self.p
        return None if self.q == n else self.q

    @property
    def result(self) -> int:
        """Bytes of a delta (m, n) that :meth:`CoreSpace.delta` returns, float32."""
        m, n = self.shape
        return 4 * m * n if self.rank is None else 4 * self.rank * (m + n)

    @property
    def leaving(self) -> int:
        """Bytes at the peak of :meth:`CoreSpace.delta`, of the matrix that it is given too.

        The factors, or the matrix, in float64 and in float32. A delta of whitened inputs is brought
        back in float64, which takes a copy, a triangular solve, and a QR of the factor.
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
        ranks: Their ranks, None for a dense one; one or more.
        width: Bytes of an entry of a dense delta as it is looked at, 4 or 8.
        is_whitened: Whether they come in whitened inputs.
    """
    m, n = shape
    count = len(ranks)
    own = tuple(min(m, n) if rank is None else min(rank, m, n) for rank in ranks)
    R = sum(rank or 0 for rank in ranks)
    # Factors that are whitened become float64; others stay as they are, held by who has them.
    waiting = 8 * R * (m + n) if is_whitened else 0
    if None not in ranks:
        p, q = min(R, m), min(R, n)
        factored = tuple(stays_factored(p, q, r) for r in own)
        products = 8 * p * q * factored.count(False)
        # In float64, of a side that has a basis: the factors, all side by side, LAPACK's copy, and
        # its results Q and R; of B while those of A wait, or of A beside what is kept of B.
        (left, left_making), (right, right_making) = (
            (8 * R * side + 8 * R * R, 32 * R * side + 8 * R * R) if side > R else (0, 0)
            for side in (m, n)
        )
        bases = 8 * R * ((m if m > R else 0) + (n if n > R else 0))
        kept = waiting + left + right
        making = max(waiting + max(left_making, left + right_making), kept + products)
        nbytes = (kept if any(factored) else bases) + products
        return CoreShape(shape, p, q, own, factored, bases, nbytes, making, is_whitened)
    # The last one is still to be widened, and its base; whitening makes two more of float64.
    widening = (2 * width + (16 if is_whitened else 0)) * m * n
    if not _span_a_part(shape, count):
        factored = tuple(rank is not None and stays_factored(m, n, rank) for rank in ranks)
        nbytes = waiting + 8 * m * n * factored.count(False)
        making = nbytes + widening
        return CoreShape(shape, m, n, own, factored, 0, nbytes, making, is_whitened)
    # Few matrices much longer than high: all side by side, LAPACK's copy, and the basis Q.
    matrices, side = 8 * count * m * n, count * min(m, n)
    p, q = (side, n) if m > n else (m, side)
    kept = matrices + 8 * count * p * q
    making = max(matrices + widening, 4 * matrices)
    return CoreShape(shape, p, q, own, (False,) * count, matrices, kept, making, is_whitened)


def _common_basis(factors: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """Return an orthonormal basis (m, p) of all columns, and the factors (p, r_t) in it.

    Where they have as many columns as rows: None, and the factors as they are.
    """
    ranks = [factor.shape[1] for factor in factors]
    if sum(ranks) >= factors[0].shape[0]:
        return None, list(factors)
    Q, R = torch.linalg.qr(ready(torch.cat([factor.double() for factor in factors], dim=1)))
    return Q, list(R.split(ranks, dim=1))


def _coordinates(
    delta: Delta, device: torch.device, whitening: Whitening | None
) -> Whole | Factored:
    """Return a delta in the coordinates it has."""
    if isinstance(delta, LowRank):
        moved = _moved(delta, device, whitening)
        return coordinates(moved.B, moved.A.T, moved.scale)
    # Moved in the width that it has, and widened there.
    matrix = delta.matrix.to(device)
    return Whole(matrix.double() if whitening is None else whitening.whiten(Dense(matrix)).matrix)


def _moved(delta: LowRank, device: torch.device, whitening: Whitening | None) -> LowRank:
    moved = LowRank(delta.B.to(device), delta.A.to(device), delta.scale)
    return moved if whitening is None else whitening.whiten(moved)


def _noise(delta: Delta) -> float:
    exact = isinstance(delta, LowRank) or delta.dtype == torch.float64
    return FLOAT64_NOISE if exact else FLOAT32_NOISE
