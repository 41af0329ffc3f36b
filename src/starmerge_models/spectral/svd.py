"""The result of every SVD kernel, and when a fast one's may be used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from starmerge_models.deltas import LowRank

_T = TypeVar("_T")
_LOG = logging.getLogger("starmerge_models.spectral")


class UncertainError(ArithmeticError):
    """A fast decomposition cannot vouch for what was asked of it; the exact one can."""


class Decomposition(Protocol):
    """A delta's singular values, and as many of its triplets as are asked for."""

    @property
    def S(self) -> Tensor:  # noqa: N802
        """(k,) float64, all of them, descending; may end in zeros or what rounding made of them."""

    @property
    def error(self) -> Tensor:
        """(k,) float64, how far each value may be from the true one; zeros for an exact SVD."""

    def first(self, k: int) -> SVD:
        """Return the first k triplets, or all if there are fewer.

        Raises:
            UncertainError: They are not known well enough.
        """

    def exact(self) -> Decomposition:
        """Return the decomposition that has no error but float64's, and is always certain."""


def certainly(decomposed: Decomposition, work: Callable[[Decomposition], _T]) -> _T:
    """Return what ``work`` makes of a decomposition, or of the exact one if it is not certain.

    The reason is logged for debugging, under the name "starmerge_models.spectral".
    """
    try:
        return work(decomposed)
    except UncertainError as reason:
        log_exact(reason)
        return work(decomposed.exact())


def log_exact(reason: UncertainError) -> None:
    """Log why an exact SVD is made."""
    _LOG.debug("Exact SVD: %s", reason)


@dataclass(frozen=True, eq=False)
class SVD:
    """A thin singular value decomposition δ = U diag(S) Vᵀ.

    In float64; but what the fast kernel found of a float32 delta has the vectors of its longer
    side in float32 (:class:`starmerge_models.spectral.gram.GramSVD`).
    """

    U: Tensor
    """(m, k), orthonormal columns."""
    S: Tensor
    """(k,) float64, descending, not negative. May end in zeros; empty for a zero delta."""
    V: Tensor
    """(n, k), orthonormal columns."""

    @property
    def error(self) -> Tensor:
        """Zeros; see :class:`Decomposition`."""
        return torch.zeros_like(self.S)

    def first(self, k: int) -> SVD:
        """Return the first k triplets, or all if there are fewer."""
        return SVD(self.U[:, :k], self.S[:k], self.V[:, :k])

    def above(self, floor: float) -> SVD:
        """Return the triplets of σ > ``floor``; all of them if it is negative."""
        return self.first(int((floor < self.S).sum()))

    def to(self, device: torch.device) -> SVD:
        """Return the same triplets on a device."""
        return SVD(self.U.to(device), self.S.to(device), self.V.to(device))

    def exact(self) -> SVD:
        """Return this SVD."""
        return self

    def compose(self, values: Tensor) -> LowRank:
        """Return U_r diag(values) V_rᵀ in the factors' own precision.

        In float64 where the SVD is, so that bases that several deltas share are still shared. The
        values go to vectors in float64: singular values may lie beyond float32's range though
        entries do not.

        Args:
            values: (r,) float64, new values for the first r triplets.
        """
        U, V = self.U[:, : len(values)], self.V[:, : len(values)]
        if U.dtype == values.dtype:
            return LowRank(U * values, V.T)
        return LowRank(U, (V * values).T)
