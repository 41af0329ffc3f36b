"""Whitened inputs: task vectors in the metric of the inputs that a weight receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank
from starmerge_models.device import ready
from starmerge_models.spectral.moment import Moment, Side

RIDGE = 1.0
"""ρ, the ridge that is added to Σ before whitening, as a share of its mean eigenvalue.

In language models one direction often holds half of the trace of Σ. With ρ = 1 the few dominant
directions of the inputs have a larger weight, and all other directions nearly equal weights, even
if they are rare in the calibration text; docs/results.md compares values of ρ."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """The change of basis τ ↦ τ L, in which inputs of the second moment Σ_ρ = L Lᵀ are white.

    ‖τ L‖² is then E‖τ x‖²: the norm of a task vector is that of the change of the outputs. A
    rotation-equivariant merge does not depend on the choice of the root L; this one is the lower
    triangular Cholesky factor. If the inputs are on the rows of the stored matrix, τ ↦ Lᵀ τ.
    """

    L: Tensor
    """(n, n) float64, lower triangular."""
    side: Side

    @classmethod
    def of(cls, moment: Moment, side: Side, ridge: float = RIDGE) -> Whitening:
        """Return the whitening for Σ_ρ = Σ + ρ c I, c = tr Σ/n being the mean eigenvalue of Σ.

        If Σ is zero, L = I.

        Cost: k n² + n³/3 operations, and 24 n² bytes.

        Args:
            moment: Σ, given by its root (k, n).
            side: The side of the stored matrix on which the inputs are.
            ridge: ρ, positive.
        """
        R = moment.root.double()
        sigma = R.T @ R
        c = float(sigma.diagonal().mean())
        sigma.diagonal().add_(ridge * c if c > 0 else 1.0)
        return cls(torch.linalg.cholesky(ready(sigma)), side)

    def to(self, device: torch.device) -> Whitening:
        """Return the same whitening on a device."""
        return Whitening(self.L.to(device), self.side)

    def multiply(self, X: Tensor) -> Tensor:
        """Return Lᵀ X for X (n, r), float64, whose rows belong to the entries of the input."""
        return self.L.T @ X

    def solve(self, X: Tensor) -> Tensor:
        """Return L⁻ᵀ X, the inverse of :meth:`multiply`."""
        found: Tensor = torch.linalg.solve_triangular(ready(self.L.T), X, upper=True)
        return found

    @overload
    def whiten(self, delta: LowRank) -> LowRank: ...

    @overload
    def whiten(self, delta: Dense) -> Dense: ...

    @overload
    def whiten(self, delta: Delta) -> Delta: ...

    def whiten(self, delta: Delta) -> Delta:
        """Return a delta in whitened inputs, in float64; a low-rank delta stays low-rank."""
        if isinstance(delta, LowRank):
            B, A = delta.B.double(), delta.A.double()
            if self.side == "columns":
                return LowRank(B, self.multiply(A.T).T, delta.scale)
            return LowRank(self.multiply(B), A, delta.scale)
        matrix = delta.matrix.double()
        return Dense(self.multiply(matrix.T).T if self.side == "columns" else self.multiply(matrix))

    @overload
    def restore(self, delta: LowRank) -> LowRank: ...

    @overload
    def restore(self, delta: Delta) -> Delta: ...

    def restore(self, delta: Delta) -> Delta:
        """Transform a delta of whitened inputs back to the weight's own inputs, in float64.

        For a low-rank delta, the transformed factor gets orthonormal columns or rows. Otherwise one
        factor would have large columns for small rows of the other, and rounding the factors to
        float32 would cause a larger error of the product than of the factors.
        """
        is_right = self.side == "columns"
        if isinstance(delta, LowRank):
            B, A = delta.B.double(), delta.A.double()
            Q, R = torch.linalg.qr(ready(self.solve(A.T if is_right else B)))
            if is_right:
                return LowRank(B @ R.T, Q.T, delta.scale)
            return LowRank(Q, R @ A, delta.scale)
        matrix = delta.matrix.double()
        return Dense(self.solve(matrix.T).T if is_right else self.solve(matrix))


def whitening_bytes(k: int, n: int) -> int:
    """Return the peak bytes of :meth:`Whitening.of`: for a root (k, n) in float64, 24 n².

    They are Σ, LAPACK's copy, and the root, whose 8 n² bytes remain.
    """
    return 8 * k * n + 24 * n * n


@dataclass(frozen=True, eq=False)
class Inputs:
    """The moments of one tensor's inputs, read lazily.

    Not thread-safe.
    """

    side: Side
    """The side of the stored matrix on which the inputs are."""
    read: Callable[[int | None], Moment]
    """Reads the moment of a task's own inputs by its number, or the shared moment of all tasks for
    None.

    It raises a UsageError if there is no such moment, and a StarmergeError if it is damaged."""

    @cached_property
    def whitening(self) -> Whitening:
        """The whitening that all tasks share, computed once."""
        return Whitening.of(self.read(None), self.side)
