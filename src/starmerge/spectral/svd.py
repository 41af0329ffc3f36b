"""The result of every SVD kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from starmerge.deltas import LowRank


@dataclass(frozen=True, eq=False)
class SVD:
    """A thin singular value decomposition δ = U diag(S) Vᵀ, float64 throughout."""

    U: Tensor
    """(m, k), orthonormal columns."""
    S: Tensor
    """(k,), descending, not negative. May end in zeros; empty for a zero delta."""
    V: Tensor
    """(n, k), orthonormal columns."""

    def first(self, k: int) -> SVD:
        """Return the first k triplets, or all if there are fewer."""
        return SVD(self.U[:, :k], self.S[:k], self.V[:, :k])

    def compose(self, values: Tensor) -> LowRank:
        """Return U_r diag(values) V_rᵀ in float64 factors.

        In float64, so that bases that several deltas share are still shared afterwards.

        Args:
            values: (r,) new values for the first r triplets.
        """
        rank = len(values)
        return LowRank(self.U[:, :rank] * values, self.V[:, :rank].T)
