"""The leading triplets of a dense delta, by the Gram matrix of its shorter side.

What a truncation keeps is U_r U_rᵀ D: all singular values, to find r and the nuclear norm, but
only r vectors of the shorter side. With p = min(m, n) and q = max(m, n):

1. G = X Xᵀ (p, p) in float64, X the delta with its shorter side first, panel by panel, so that no
   float64 copy of D is made. X is scaled by a power of two, so that no square leaves the range.
2. G = Q T Qᵀ, all eigenvalues λ = σ² of it, and eigenvectors as many as are asked for
   (:mod:`starmerge_models.spectral.tridiagonal`; torch's ``eigh`` on other devices than the CPU).
3. W = U_rᵀ X in D's own width, float32 or float64; V_r = Wᵀ/σ.

**Errors.** G is known to some units of rounding of λ_1. As |σ̂ − σ| = |λ̂ − λ|/(σ̂ + σ), a σ is known
to min(√δ, δ/σ̂) with δ ≥ |λ̂ − λ|: small singular values have fewer digits, and below √δ none. Who
asks for what hangs on them (the rank, the nuclear norm, the count above a noise floor) compares it
with :attr:`GramSVD.error`.

**Certificate.** No result leaves this file unless: LAPACK succeeded; Σλ is ‖D‖² to 1e-10; the
vectors are orthonormal to 1e-5; each ‖u_kᵀD‖ is σ_k to 1e-4 and Σ‖u_kᵀD‖² is Σσ_k² to 1e-6; and,
with D_r the part that is kept and ε_k the errors above,

- ‖W − U_rᵀD‖ ≤ 1e-5 ‖D_r‖ (1e-12 in float64): the products;
- ‖(D Dᵀ U_r − U_r Σ²) Σ⁻¹‖ ≤ ‖(ε_1, …, ε_r)‖: the vectors. Clean ones leave a tenth of that;
- ε_r σ_r/(σ_r − σ_{r+1}) ≤ 1e-4 ‖D_r‖: the cut. What a change of ε_r σ_r in DDᵀ that turns this
  pair alone does to the output; of rounding, which favours no pair, 3 % of it was measured at most.

Else :class:`UncertainError`, after which the exact SVD is made
(:func:`starmerge_models.spectral.svd.certainly`). Energies see the square of an angle. The first
two norms see the angle; they are those of one vector of random signs, the same in every run, whose
mean is the Frobenius norm.

What that shows: U_r turned out of the space of true singular vectors changes the output by at most
‖(ε_1, …, ε_r)‖ σ_r/(σ_r − σ_{r+1}), about √r times what the third check allows at worst. What it
cannot: tell true triplets at the cut from their neighbours where σ_r ≪ σ_1 and the gap is so small
that an exchange leaves no larger a residual than rounding does.
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

from starmerge_models.deltas import Dense, wide
from starmerge_models.device import is_large, run
from starmerge_models.spectral import lapack
from starmerge_models.spectral.dense import svd_bytes, svd_matrix
from starmerge_models.spectral.svd import SVD, Decomposition, UncertainError, log_exact
from starmerge_models.spectral.tridiagonal import Eigen, FullEigen, Tridiagonal

PANEL = 256
"""Columns of X that are float64 at once."""

PRODUCT = {torch.float32: 1e-5, torch.float64: 1e-12}
"""What may be wrong in products of D's width, as a share of the norm of what is kept."""

CUT = 1e-4
"""What the directions at the cut may be turned by at worst, as a share of the same.

Measured at gaps down to 1e-11 were 3 % of that bound at most.
"""

SMALL = 128
"""Sides shorter than this are left to the exact SVD, which is as fast there."""

_T = TypeVar("_T")

_PRECISION_LOCK = Lock()


def svd_dense(delta: Dense, floor: float = -1.0) -> Decomposition:
    """Return the decomposition of a full matrix: lazy where it is large, exact where it must be.

    Large ones go to a GPU, if torch has one (:mod:`starmerge_models.device`); what comes back may
    differ in the last digits.

    When to use: for deltas of full fine-tunes. Cost: see :class:`GramSVD`; nothing for a matrix of
    zeros, which has no triplets.

    Args:
        delta: The matrix.
        floor: Singular values up to this are left out; none if it is negative.

    Raises:
        torch.linalg.LinAlgError: There is a NaN or an infinity in the matrix.
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
    """Return the bytes at the peak of :func:`svd_dense` and of the triplets, beside the delta.

    The exact SVD counts, as it is needed where the fast one is not certain.

    Args:
        m: Rows of the delta.
        n: Its columns.
        width: Bytes of an entry of the delta as it is looked at, 4 or 8.
        kept: Largest number of triplets that are asked for; by default all.
    """
    p, q = min(m, n), max(m, n)
    exact = 8 * p * q + svd_bytes(m, n)
    if p < SMALL:
        return exact
    k = p if kept is None else min(kept, p)
    # The Gram matrix stays, in which the reflectors lie, while the exact SVD is made.
    gram = 8 * p * p
    # X with the base widened beside it, a panel, and of each triplet a vector in float64 and in
    # D's width, its overlaps with the others, and the longer side's vector.
    fast = 2 * width * p * q + 8 * PANEL * p + k * (8 * p + width * (p + k + q))
    return gram + max(fast, exact)


def _exact_svd(delta: Dense, floor: float) -> SVD:
    """Return the exact SVD, where the delta lies."""

    def decompose(device: torch.device) -> SVD:
        return svd_matrix(delta.matrix.to(device).double(), floor).to(delta.device)

    m, n = delta.shape
    return run(decompose, home=delta.device, need=60 * m * n if is_large(delta.shape) else None)


class GramSVD:
    """The lazy decomposition of a dense delta: all singular values now, triplets when asked for.

    When to use: from :data:`SMALL` rows and columns on. Cost: p²q + 4/3 p³ float64 operations for
    the values, 2p²k float64 and 2pqk of D's width for k triplets.

    Memory, beside D (and a float32 copy of it, while it is looked at, if D has another dtype or is
    still to be subtracted): 8p² bytes as long as this object lives, 8·256·p while it is made and
    while triplets are; for k of them 12pk + 4qk of a float32 delta, 16pk + 8qk of a float64 one. An
    exact SVD, where it is needed, takes up to 60pq, and 8p(p + q) bytes as long as this object
    lives. On a GPU nothing stays between the calls.

    Args:
        delta: Not empty. Its tensors are kept, but not the object itself.
        floor: Singular values up to this are left out; none if it is negative.
        eigen: Decomposes the Gram matrix, which it may overwrite; chosen by the device if not
            given.

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
        # A copy, of the object only: what is remembered for a delta must not keep it alive.
        self._delta, self._floor, self._lock = copy(delta), floor, Lock()
        self._exact: SVD | None = None
        self._home = delta.device
        self._eigen, self._scale, energy = self._run(partial(self._decompose, eigen))
        values = self._eigen.values.clamp(min=0)
        _check("energy of the singular values", abs(float(values.sum()) / energy - 1), 1e-10)
        self._sigma, self._doubt = values.sqrt(), _doubt(values)
        S = self._sigma / self._scale
        error = torch.minimum(self._doubt / self._sigma, self._doubt.sqrt()) / self._scale
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
        """Return (scale · X)(scale · X)ᵀ decomposed, the scale, and the trace by itself."""
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
        """Return the exact SVD, made once; see :meth:`Decomposition.exact`."""
        with self._lock:
            if self._exact is None:
                self._exact = _exact_svd(self._delta, self._floor)
            return self._exact

    def _check_cut(self, k: int) -> None:
        """Check that rounding leaves little open of which directions are the first k."""
        if 0 < k < len(self._sigma):
            gap = self._sigma[k - 1] - self._sigma[k]
            off = float(self._doubt[k - 1] / gap)  # infinity at a tie
            _check("directions at the cut", off / _norm(self._sigma[:k]), CUT)

    def _check_on_signs(self, X: Tensor, U: Tensor, W: Tensor) -> None:
        """Check W = Uᵀ X and X Xᵀ U = U Σ², times a vector of random signs, in float64."""
        sigma = self._sigma[: U.shape[1]].to(U.device)
        size = _norm(sigma)
        generator = torch.Generator().manual_seed(0)
        z = (2.0 * torch.randint(2, sigma.shape, generator=generator) - 1).to(sigma)
        # One by one, since BLAS is slow at matrices of two columns.
        left, scaled = U @ z, U @ (z / sigma)
        product, back = sigma.new_empty(X.shape[1]), sigma.new_zeros(len(X))
        for start, panel in _panels(X, self._scale):
            product[start : start + PANEL] = panel.T @ left
            back.addmv_(panel, panel.T @ scaled)
        wrong = _norm(z.to(W.dtype) @ W - product)
        _check("products", wrong / size, PRODUCT[W.dtype])
        rounding = _norm(self._doubt[: len(z)].to(sigma.device) / sigma)
        _check("vectors' residuals", _norm(back - U @ (sigma * z)) / size, rounding / size)

    @property
    def _is_tall(self) -> bool:
        m, n = self._delta.shape
        return m > n

    def _run(self, work: Callable[[torch.device], _T]) -> _T:
        p, q = sorted(self._delta.shape)
        # X, and products of its size; the Gram matrix, its vectors and what finding them takes.
        need = 2 * wide(self._delta.dtype).itemsize * p * q + 48 * p * p + 8 * PANEL * p
        return run(work, home=self._home, need=need if is_large((p, q)) else None)

    def _short_side_first(self, device: torch.device) -> Tensor:
        matrix = self._delta.matrix
        matrix = matrix.to(device, wide(matrix.dtype))
        return matrix.T if self._is_tall else matrix


def _gram(X: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return the upper triangle of (scale · X)(scale · X)ᵀ in float64, and its trace by itself."""
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
    """Yield (start, scale · X[:, start : start + PANEL]) in float64, in the same memory each."""
    p, q = X.shape
    # Copied as they lie: rows of X, or columns.
    by_rows = X.stride(1) == 1
    buffer = X.new_empty((p, PANEL) if by_rows else (PANEL, p), dtype=torch.float64)
    for start in range(0, q, PANEL):
        columns = X[:, start : start + PANEL]
        width = columns.shape[1]
        panel = buffer[:, :width] if by_rows else buffer[:width].T
        yield start, panel.copy_(columns).mul_(scale)


def _doubt(values: Tensor) -> Tensor:
    """Return by how much eigenvalues of a Gram matrix (p, p) may be wrong, (p,) descending.

    Its entries are rounded, which moves every eigenvalue by some units of rounding of the largest;
    and p reflections leave a relative error that adds up like a walk. Measured for sides of 64 to
    1024, square and oblong, and spectra from flat to those of rank one: up to 7 units for small
    eigenvalues, whatever p, and 5√p for those near the largest. Taken are 32 and 16√p.
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
    """Let float32 products be of float32 numbers, where the user allows TensorFloat-32."""
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
