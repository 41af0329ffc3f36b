"""Whitened inputs: task vectors in a metric that counts the inputs that a weight really gets."""

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
"""ρ, what is added to Σ before whitening, as a share of its mean eigenvalue.

In language models one direction often holds half of the trace of Σ. With ρ = 1 the few directions
that the inputs favour count for more, and all others nearly alike, however seldom the
calibration's text reached them; docs/results.md compares values of ρ."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """The change of basis τ ↦ τ L, in which inputs of the second moment Σ_ρ = L Lᵀ are white.

    ‖τ L‖² is then E‖τ x‖²: the size of a task vector is that of the outputs it makes. A merge that
    rotations leave alone may take any root L; this one is Cholesky's, lower triangular. Where the
    input lies on the rows of the stored matrix, τ ↦ Lᵀ τ.
    """

    L: Tensor
    """(n, n) float64, lower triangular."""
    side: Side

    @classmethod
    def of(cls, moment: Moment, side: Side, ridge: float = RIDGE) -> Whitening:
        """Return the whitening for Σ_ρ = Σ + ρ c I, c = tr Σ/n being the mean eigenvalue of Σ.

        A Σ of zeros says nothing of the inputs: then L = I.

        Cost: k n² + n³/3 operations, and 24 n² bytes.

        Args:
            moment: Σ, by its root (k, n).
            side: Where the input lies on the stored matrix.
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

    def into(self, X: Tensor) -> Tensor:
        """Return Lᵀ X of some X (n, r), float64, whose rows belong to the entries of the input."""
        return self.L.T @ X

    def back(self, X: Tensor) -> Tensor:
        """Return L⁻ᵀ X, which undoes :meth:`into`."""
        found: Tensor = torch.linalg.solve_triangular(ready(self.L.T), X, upper=True)
        return found

    @overload
    def whiten(self, delta: LowRank) -> LowRank: ...

    @overload
    def whiten(self, delta: Dense) -> Dense: ...

    @overload
    def whiten(self, delta: Delta) -> Delta: ...

    def whiten(self, delta: Delta) -> Delta:
        """Return a delta in whitened inputs, in float64; a low-rank one stays so."""
        if isinstance(delta, LowRank):
            B, A = delta.B.double(), delta.A.double()
            if self.side == "columns":
                return LowRank(B, self.into(A.T).T, delta.scale)
            return LowRank(self.into(B), A, delta.scale)
        matrix = delta.matrix.double()
        return Dense(self.into(matrix.T).T if self.side == "columns" else self.into(matrix))

    @overload
    def restore(self, delta: LowRank) -> LowRank: ...

    @overload
    def restore(self, delta: Delta) -> Delta: ...

    def restore(self, delta: Delta) -> Delta:
        """Return a delta of whitened inputs as one of the weight itself, in float64.

        The factor of a low-rank one that is brought back gets orthonormal columns or rows. Else
        large columns of one factor would stand beside small rows of the other, and whoever rounds
        the factors to float32 would lose more of the product than of either.
        """
        is_right = self.side == "columns"
        if isinstance(delta, LowRank):
            B, A = delta.B.double(), delta.A.double()
            Q, R = torch.linalg.qr(ready(self.back(A.T if is_right else B)))
            if is_right:
                return LowRank(B @ R.T, Q.T, delta.scale)
            return LowRank(Q, R @ A, delta.scale)
        matrix = delta.matrix.double()
        return Dense(self.back(matrix.T).T if is_right else self.back(matrix))


def whitening_bytes(k: int, n: int) -> int:
    """Return the bytes at the peak of :meth:`Whitening.of`: for a root (k, n) in float64, 24 n².

    Σ, a copy that LAPACK works on, and its root, of which 8 n² stay.
    """
    return 8 * k * n + 24 * n * n


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known of the inputs of one tensor; moments are read when they are asked for.

    Used by one thread at a time.
    """

    side: Side
    """Where the input lies on the stored matrix."""
    read: Callable[[int | None], Moment]
    """Reads the moment of a task's own inputs by its number, or of the text for all tasks (None).

    It raises a UsageError if there is no such moment, a StarmergeError if that is damaged."""

    @cached_property
    def whitening(self) -> Whitening:
        """The whitening by the text for all tasks; made once."""
        return Whitening.of(self.read(None), self.side)
