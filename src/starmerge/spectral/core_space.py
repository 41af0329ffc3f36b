"""Core Space: the task vectors of one tensor in common orthonormal bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from starmerge.deltas import Delta, Dense, LowRank
from starmerge.device import CPU, is_large, ready, run
from starmerge.spectral.metric import Whitening

_T = TypeVar("_T")

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
    home: torch.device = CPU
    """Where the deltas lie. The matrices and bases lie on the device that works with them."""
    whitening: Whitening | None = None
    """Brought the deltas into whitened inputs, of which :meth:`delta` and :meth:`product` bring
    their results back; on the device of the matrices."""

    @property
    def floor(self) -> float:
        """Singular values of the C_t, of their sums and differences that are at most this are zero.

        :attr:`noise` times the sum of the task vectors' Frobenius norms.
        """
        return self.noise * sum(float(torch.linalg.vector_norm(C)) for C in self.matrices)

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
    Core Space are small, stay where they are. See :func:`starmerge.device.run`.

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
    if len(low) < len(deltas):
        matrices = [_matrix(delta, device, whitening) for delta in deltas]
        # Of a few matrices much longer than high, the rows span a part of their space.
        U, lefts = _common_basis(matrices) if m > n else (None, matrices)
        if U is not None:
            return CoreSpace(lefts, (m, n), U, None, noise, home, whitening)
        V, rights = _common_basis([matrix.T for matrix in matrices]) if n > m else (None, [])
        if V is not None:
            C = [right.T for right in rights]
            return CoreSpace(C, (m, n), None, V, noise, home, whitening)
        return CoreSpace(matrices, (m, n), None, None, noise, home, whitening)
    low = [_moved(delta, device, whitening) for delta in low]
    U, lefts = _common_basis([delta.B for delta in low])
    V, rights = _common_basis([delta.A.T for delta in low])
    matrices = [
        _product(left, right, delta.scale)
        for left, right, delta in zip(lefts, rights, low, strict=True)
    ]
    return CoreSpace(matrices, (m, n), U, V, noise, home, whitening)


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
    nbytes: int
    """Bytes of the matrices and the bases."""
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
    own = [min(m, n) if rank is None else min(rank, m, n) for rank in ranks]
    if None not in ranks:
        R = sum(rank or 0 for rank in ranks)
        p, q = min(R, m), min(R, n)
        matrices = 8 * count * p * q
        kept = matrices + 8 * R * ((m if m > R else 0) + (n if n > R else 0))
        # In float64: the factors, all side by side, LAPACK's copy, and its result Q; of B while
        # those of A wait, or of A beside the basis of B. Whitened ones wait beside all that.
        waiting = 8 * R * (m + n) if is_whitened else 0
        making = waiting + max(32 * R * m, 8 * R * m + 32 * R * n) + 16 * R * R
        return CoreShape(shape, p, q, tuple(own), kept, max(kept, making), is_whitened)
    matrices = 8 * count * m * n
    # The last one is still to be widened, and its base; whitening makes two more of float64.
    making = matrices + (2 * width + (16 if is_whitened else 0)) * m * n
    if count * min(m, n) >= max(m, n):
        return CoreShape(shape, m, n, tuple(own), matrices, making, is_whitened)
    # Few matrices much longer than high: all side by side, LAPACK's copy, and the basis Q.
    R = count * min(m, n)
    p, q = (R, n) if m > n else (m, R)
    kept = matrices + 8 * count * p * q
    return CoreShape(shape, p, q, tuple(own), kept, max(making, 4 * matrices), is_whitened)


def _common_basis(factors: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """Return an orthonormal basis (m, p) of all columns, and the factors (p, r_t) in it."""
    wide = [factor.double() for factor in factors]
    ranks = [factor.shape[1] for factor in wide]
    if sum(ranks) >= wide[0].shape[0]:
        return None, wide
    Q, R = torch.linalg.qr(ready(torch.cat(wide, dim=1)))
    return Q, list(R.split(ranks, dim=1))


def _matrix(delta: Delta, device: torch.device, whitening: Whitening | None) -> Tensor:
    if isinstance(delta, LowRank):
        moved = _moved(delta, device, whitening)
        return _product(moved.B.double(), moved.A.double().T, delta.scale)
    # Moved in the width that it has, and widened there.
    matrix = delta.matrix.to(device)
    return matrix.double() if whitening is None else whitening.whiten(Dense(matrix)).matrix


def _moved(delta: LowRank, device: torch.device, whitening: Whitening | None) -> LowRank:
    moved = LowRank(delta.B.to(device), delta.A.to(device), delta.scale)
    return moved if whitening is None else whitening.whiten(moved)


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
