"""The leading triplets of a dense delta, computed from the Gram matrix of its shorter side.

A truncation U_r U_rᵀ D needs all singular values, to find r and the nuclear norm, but only r
vectors of the shorter side. With p = min(m, n) and q = max(m, n):

1. G = X Xᵀ (p, p) in float64, where X is the delta with its shorter side first. The product is
   computed by panels, without a float64 copy of D. X is scaled by a power of two, so that squares
   stay within float64's range.
2. G = Q T Qᵀ gives all eigenvalues λ = σ², and eigenvectors on request
   (:mod:`starmerge_models.spectral.tridiagonal`; torch's ``eigh`` on other devices than the CPU).
3. W = U_rᵀ X in D's own width, float32 or float64; V_r = Wᵀ/σ.

**Errors.** G is accurate to some units of rounding of λ_1. As |σ̂ − σ| = |λ̂ − λ|/(σ̂ + σ), the error
of σ is at most min(√δ, δ/σ̂) with δ ≥ |λ̂ − λ|: small singular values have fewer correct digits, and
those below √δ have none. Callers whose result depends on small singular values (the rank, the
nuclear norm, the count above a noise floor) must check it against :attr:`GramSVD.error`.

**Certificate.** A result is only returned if LAPACK succeeded; Σλ is ‖D‖² to 1e-10; the vectors are
orthonormal to 1e-5; each ‖u_kᵀD‖ is σ_k to 1e-4 and Σ‖u_kᵀD‖² is Σσ_k² to 1e-6; and, with D_r the
kept part and ε_k the errors above,

- ‖W − U_rᵀD‖ ≤ 1e-5 ‖D_r‖ (1e-12 in float64), which checks the products;
- ‖(D Dᵀ U_r − U_r Σ²) Σ⁻¹‖ ≤ ‖(ε_1, …, ε_r)‖, which checks the vectors. Accurate vectors give a
  tenth of the bound;
- ε_r σ_r/(σ_r − σ_{r+1}) ≤ 1e-4 ‖D_r‖, which checks the cut. The left side is the effect on the
  output of a change of ε_r σ_r in DDᵀ that rotates only this pair; rounding, which affects all
  pairs, has reached at most 3 % of it in measurements.

Otherwise :class:`UncertainError` is raised, and the caller computes the exact SVD
(:func:`starmerge_models.spectral.svd.with_exact_fallback`). Checks of energies detect the square of
an angle. The first two norms above detect the angle itself; they are estimated by a product with
one vector of random signs, the same in every run, whose mean is the Frobenius norm.

The certificate proves that a rotation of U_r out of the space of the true singular vectors changes
the output by at most ‖(ε_1, …, ε_r)‖ σ_r/(σ_r − σ_{r+1}), about √r times the bound of the third
check. It does not distinguish the triplets next to the cut if σ_r ≪ σ_1 and the gap is so small
that exchanging them leaves a residual within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from starmerge_models.deltas import Dense, compute_dtype
from starmerge_models.device import is_large, run
from starmerge_models.spectral import lapack
from starmerge_models.spectral.dense import svd_bytes, svd_matrix
from starmerge_models.spectral.svd import SVD, Decomposition, UncertainError, log_exact
from starmerge_models.spectral.tridiagonal import Eigen, FullEigen, Tridiagonal

PANEL = 256
"""Columns of X that are converted to float64 at a time."""

PRODUCT = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Tolerated error of products in D's width, as a share of the norm of the kept part."""

CUT = 1e-4
"""Tolerated rotation of the directions at the cut, as a share of the norm of the kept part.

Measured rotations, for gaps down to 1e-11, were at most 3 % of this bound.
"""

SMALL = 128
"""Matrices with a side shorter than this use the exact SVD, which is as fast for them."""

_T = TypeVar("_T")

_PRECISION_LOCK = Lock()


def svd_dense(delta: Dense, floor: float = -1.0) -> Decomposition:
    """Return the decomposition of a full matrix: lazy for a large one, otherwise the exact SVD.

    Large matrices are decomposed on a GPU, if torch has one (:mod:`starmerge_models.device`); the
    result may differ in the last digits.

    When to use: for deltas of full fine-tunes. Cost: see :class:`GramSVD`; nothing for a matrix of
    zeros, which has no triplets.

    Args:
        delta: The matrix.
        floor: Singular values up to this are dropped; none if it is negative.

    Raises:
        torch.linalg.LinAlgError: The matrix has a NaN or an infinity.
    """
    if delta.is_zero():
        m, n = delta.shape
        empty = torch.zeros(0, dtype=torch.float64, device=delta.device)
        return SVD(empty.new_zeros(m, 0), empty, empty.new_zeros(n, 0))
    if min(delta.shape) >= SMALL:
        try:
            return GramSVD(delta, floor)
        except UncertainError as reason:
            log_exact(reason)
    return _exact_svd(delta, floor)


def svd_dense_bytes(m: int, n: int, width: int, kept: int | None = None) -> int:
    """Return the peak bytes of :func:`svd_dense` and of its triplets, without the delta.

    The exact SVD is included, because it is the fallback if the fast one is not certain.

    Args:
        m: Rows of the delta.
        n: Columns of the delta.
        width: Bytes of an entry of the delta when it is read, 4 or 8.
        kept: Largest number of requested triplets; by default all.
    """
    p, q = min(m, n), max(m, n)
    exact = 8 * p * q + svd_bytes(m, n)
    if p < SMALL:
        return exact
    k = p if kept is None else min(kept, p)
    # The Gram matrix, which stores the reflectors, is held during the exact SVD.
    gram = 8 * p * p
    # X, the widened base, a panel, and for each triplet a vector in float64 and in D's width, its
    # overlaps with the others, and the vector of the longer side.
    fast = 2 * width * p * q + 8 * PANEL * p + k * (8 * p + width * (p + k + q))
    return gram + max(fast, exact)


def _exact_svd(delta: Dense, floor: float) -> SVD:
    """Return the exact SVD, on the device of the delta."""

    def decompose(device: torch.device) -> SVD:
        return svd_matrix(delta.matrix.to(device).double(), floor).to(delta.device)

    m, n = delta.shape
    return run(decompose, home=delta.device, need=60 * m * n if is_large(delta.shape) else None)


class GramSVD:
    """The lazy decomposition of a dense delta: all singular values now, triplets on request.

    When to use: from :data:`SMALL` rows and columns on. Cost: p²q + 4/3 p³ float64 operations for
    the values, 2p²k float64 operations and 2pqk in D's width for k triplets.

    Memory, in addition to D (and to a temporary float32 copy, if D has another dtype or is a lazy
    difference): 8p² bytes for the lifetime of this object, and 8·256·p while values or triplets are
    computed; for k triplets 12pk + 4qk bytes of a float32 delta, 16pk + 8qk of a float64 one. An
    exact SVD, if necessary, takes up to 60pq bytes, and 8p(p + q) bytes for the lifetime of this
    object. On a GPU no memory is held between calls.

    Args:
        delta: Not empty. Its tensors are kept, but not the object itself.
        floor: Singular values up to this are dropped; none if it is negative.
        eigen: Function that decomposes the Gram matrix, which it may overwrite; by default chosen
            by the device.

    Raises:
        UncertainError: The delta is not finite or zero, or the singular values fail the
            certificate.
    """

    def __init__(
        self,
        delta: Dense,
        floor: float = -1.0,
        *,
        eigen: Callable[[Tensor], Eigen] | None = None,
    ) -> None:
        # A shallow copy: the cached decomposition of a delta must not keep the delta alive.
        self._delta, self._floor, self._lock = copy(delta), floor, Lock()
        self._exact: SVD | None = None
        self._home = delta.device
        self._eigen, self._scale, energy = self._run(partial(self._decompose, eigen))
        values = self._eigen.values.clamp(min=0)
        _check("energy of the singular values", abs(float(values.sum()) / energy - 1), 1e-10)
        self._sigma, self._error_bounds = values.sqrt(), _error_bounds(values)
        S = self._sigma / self._scale
        error = (
            torch.minimum(self._error_bounds / self._sigma, self._error_bounds.sqrt()) / self._scale
        )
        if floor >= 0 and bool(((S - floor).abs() < error).any()):
            raise UncertainError("A singular value is as close to the floor as its own error.")
        above = int((floor < S).sum())
        self.S, self.error = S[:above], error[:above]

    def first(self, k: int) -> SVD:
        """Return the first k triplets; see :meth:`Decomposition.first`."""
        return self._run(partial(self._first, k))

    def _decompose(
        self, eigen: Callable[[Tensor], Eigen] | None, device: torch.device
    ) -> tuple[Eigen, float, float]:
        """Return (scale · X)(scale · X)ᵀ decomposed, the scale, and a separately summed trace."""
        X = self._short_side_first(device)
        low, high = X.aminmax()
        peak = max(-float(low), float(high))
        if not math.isfinite(peak) or peak == 0:
            raise UncertainError(f"The largest entry is {peak}.")
        exponent = math.frexp(peak)[1] - 1
        scale = 2.0 ** min(-exponent, 1022)
        gram, energy = _gram(X, scale)
        by_device = Tridiagonal if device.type == "cpu" else partial(FullEigen, home=self._home)
        return (eigen or by_device)(gram), scale, energy

    def _first(self, k: int, device: torch.device) -> SVD:
        k = min(k, len(self.S))
        self._check_cut(k)
        X, sigma = self._short_side_first(device), self._sigma[:k].to(device)
        U = self._eigen.vectors(k).to(device) if k else sigma.new_zeros(len(X), 0)
        with _full_float32(X.device):
            left = U.to(X.dtype, copy=True)
            overlap = left.T @ left
            W = left.mul_(self._scale).T @ X
        if k:
            overlap.diagonal().sub_(1)
            _check("vectors' orthonormality", float(overlap.abs().max()), 1e-5)
            norms = torch.linalg.vector_norm(W, dim=1, dtype=torch.float64)
            _check("singular vectors", float((norms / sigma - 1).abs().max()), 1e-4)
            share = float(norms.square().sum() / sigma.square().sum())
            _check("energy of the kept subspace", abs(1 - share), 1e-6)
            self._check_on_signs(X, U, W)
        U, V = U.to(self._home), W.div_(sigma[:, None]).T.to(self._home)
        return SVD(V, self.S[:k], U) if self._is_tall else SVD(U, self.S[:k], V)

    def exact(self) -> SVD:
        """Return the exact SVD, computed once; see :meth:`Decomposition.exact`."""
        with self._lock:
            if self._exact is None:
                self._exact = _exact_svd(self._delta, self._floor)
            return self._exact

    def _check_cut(self, k: int) -> None:
        """Check that the first k directions are determined up to a small rotation."""
        if 0 < k < len(self._sigma):
            gap = self._sigma[k - 1] - self._sigma[k]
            off = float(self._error_bounds[k - 1] / gap)  # infinity at a tie
            _check("directions at the cut", off / _norm(self._sigma[:k]), CUT)

    def _check_on_signs(self, X: Tensor, U: Tensor, W: Tensor) -> None:
        """Check W = Uᵀ X and X Xᵀ U = U Σ², each times a vector of random signs, in float64."""
        sigma = self._sigma[: U.shape[1]].to(U.device)
        size = _norm(sigma)
        generator = torch.Generator().manual_seed(0)
        z = (2.0 * torch.randint(2, sigma.shape, generator=generator) - 1).to(sigma)
        # Two products with one vector each, because BLAS is slow for matrices of two columns.
        left, scaled = U @ z, U @ (z / sigma)
        product, back = sigma.new_empty(X.shape[1]), sigma.new_zeros(len(X))
        for start, panel in _panels(X, self._scale):
            product[start : start + PANEL] = panel.T @ left
            back.addmv_(panel, panel.T @ scaled)
        wrong = _norm(z.to(W.dtype) @ W - product)
        _check("products", wrong / size, PRODUCT[W.dtype])
        rounding = _norm(self._error_bounds[: len(z)].to(sigma.device) / sigma)
        _check("vectors' residuals", _norm(back - U @ (sigma * z)) / size, rounding / size)

    @property
    def _is_tall(self) -> bool:
        m, n = self._delta.shape
        return m > n

    def _run(self, work: Callable[[torch.device], _T]) -> _T:
        p, q = sorted(self._delta.shape)
        # X, and products of its size; the Gram matrix, its vectors and the work space for them.
        need = 2 * compute_dtype(self._delta.dtype).itemsize * p * q + 48 * p * p + 8 * PANEL * p
        return run(work, home=self._home, need=need if is_large((p, q)) else None)

    def _short_side_first(self, device: torch.device) -> Tensor:
        matrix = self._delta.matrix
        matrix = matrix.to(device, compute_dtype(matrix.dtype))
        return matrix.T if self._is_tall else matrix


def _gram(X: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return the upper triangle of (scale · X)(scale · X)ᵀ in float64, and its trace."""
    p = len(X)
    gram = torch.zeros(p, p, dtype=torch.float64, device=X.device)
    energy = 0.0
    for _, panel in _panels(X, scale):
        energy += float(torch.linalg.vector_norm(panel)) ** 2
        if X.device.type == "cpu":
            by_rows = panel.stride(1) == 1
            order, leading = ("T", panel.stride(0)) if by_rows else ("N", panel.stride(1))
            with lapack.one_thread():
                lapack.call(
                    "dsyrk", "L", order, p, panel.shape[1], 1.0, panel, leading, 1.0, gram, p
                )  # fmt: skip
        else:
            gram.addmm_(panel, panel.T)
    return gram, energy


def _panels(X: Tensor, scale: float) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, scale · X[:, start : start + PANEL]) in float64; the buffer is reused."""
    p, q = X.shape
    # Copied in the memory order of X, by rows or by columns.
    by_rows = X.stride(1) == 1
    buffer = X.new_empty((p, PANEL) if by_rows else (PANEL, p), dtype=torch.float64)
    for start in range(0, q, PANEL):
        columns = X[:, start : start + PANEL]
        width = columns.shape[1]
        panel = buffer[:, :width] if by_rows else buffer[:width].T
        yield start, panel.copy_(columns).mul_(scale)


def _error_bounds(values: Tensor) -> Tensor:
    """Return bounds of the errors of a Gram matrix's (p, p) eigenvalues, (p,) descending.

    Rounding of the entries changes every eigenvalue by some units of rounding of the largest; and
    the p reflections add a relative error that grows like a random walk. Measured for sides of 64
    to 1024, square and oblong, and spectra from flat to rank one: up to 7 units for small
    eigenvalues, for every p, and 5√p for those near the largest. The bounds are 32 and 16√p.
    """
    unit = torch.finfo(values.dtype).eps / 2
    return unit * (32 * values[0] + 16 * math.sqrt(len(values)) * values)


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector))


def _check(what: str, deviation: float, tolerance: float) -> None:
    if not deviation < tolerance:
        raise UncertainError(f"The {what} are off by {deviation:.1e}, more than {tolerance:.0e}.")


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Disable TensorFloat-32 for products of float32 matrices, even if the user enabled it."""
    if device.type == "cpu":
        yield
        return
    with _PRECISION_LOCK:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
