"""The results of SVD kernels, and the fallback from a fast kernel to the exact one."""

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
    """A fast decomposition is not accurate enough for a request; the exact one must be used."""


class Decomposition(Protocol):
    """A delta's singular values, and its leading triplets on request."""

    @property
    def S(self) -> Tensor:  # noqa: N802
        """(k,) float64, all singular values, descending; zeros at the end may be rounding."""

    @property
    def error(self) -> Tensor:
        """(k,) float64, error bounds of the singular values; zeros for an exact SVD."""

    def first(self, k: int) -> SVD:
        """Return the first k triplets, or all if there are fewer.

        Raises:
            UncertainError: They are not accurate enough.
        """

    def exact(self) -> Decomposition:
        """Return the decomposition with full float64 accuracy, which is never uncertain."""


def with_exact_fallback(decomposed: Decomposition, work: Callable[[Decomposition], _T]) -> _T:
    """Return ``work(decomposed)``, or ``work`` of the exact one after an UncertainError.

    The reason is logged at debug level to "starmerge_models.spectral".
    """
    try:
        return work(decomposed)
    except UncertainError as reason:
        log_exact(reason)
        return work(decomposed.exact())


def log_exact(reason: UncertainError) -> None:
    """Log the reason for an exact SVD."""
    _LOG.debug("Exact SVD: %s", reason)


@dataclass(frozen=True, eq=False)
class SVD:
    """A thin singular value decomposition δ = U diag(S) Vᵀ.

    All parts are float64, except that the fast kernel returns the vectors of a float32 delta's
    longer side in float32 (:class:`starmerge_models.spectral.gram.GramSVD`).
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
        """Return the triplets of σ > ``floor``; all triplets if it is negative."""
        return self.first(int((floor < self.S).sum()))

    def to(self, device: torch.device) -> SVD:
        """Return a copy on a device."""
        return SVD(self.U.to(device), self.S.to(device), self.V.to(device))

    def exact(self) -> SVD:
        """Return this SVD."""
        return self

    def compose(self, values: Tensor) -> LowRank:
        """Return U_r diag(values) V_rᵀ in the precision of the vectors.

        It is float64 if the SVD is, so that several deltas keep exactly the same bases. The values
        are multiplied to float64 vectors, because singular values may exceed float32's range even
        if the entries do not.

        Args:
            values: (r,) float64, new values for the first r triplets.
        """
        U, V = self.U[:, : len(values)], self.V[:, : len(values)]
        if U.dtype == values.dtype:
            return LowRank(U * values, V.T)
        return LowRank(U, (V * values).T)
