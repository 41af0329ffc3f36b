"""The spectrum of one task vector of one tensor, and its leading singular triplets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, LowRank
from starmerge_models.methods.denoise import rounding_of
from starmerge_models.methods.kinds.spectral import is_averaged
from starmerge_models.methods.method import TensorContext
from starmerge_models.spectral import (
    SVD,
    Decomposition,
    Truncation,
    svd,
    truncation_of,
    with_exact_fallback,
)
from starmerge_models.spectral.core_space import FLOAT32_NOISE

LEADING = 128
"""Number of a dense delta's triplets that are compared with other tasks, unless STAR keeps more."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of τ (above the noise floor where it applies) and its leading triplets.

    Below, p_k = σ_k/Σσ.
    """

    values: Tensor
    """(k,) float64, descending."""
    svd: SVD
    """The triplets that are compared with other tasks: all of factors; of a dense delta the first
    :data:`LEADING`, or as many as STAR keeps."""
    truncation: Truncation
    """STAR's truncation."""
    energy: float
    """‖τ‖² of the whole delta, including noise."""
    rank: int
    """Number of singular values above rounding errors."""

    @property
    def kept(self) -> int:
        """The rank that STAR keeps."""
        return self.truncation.rank

    @cached_property
    def above(self) -> float:
        """Σσ² of :attr:`values`."""
        return float(self.values.square().sum())

    @property
    def noise(self) -> float:
        """The share of ‖τ‖² below the noise floor; 0 if no floor applies."""
        floor = self.truncation.noise
        if floor is None or not floor.applies or not self.energy:
            return 0.0
        return max(0.0, 1 - self.above / self.energy)

    @property
    def effective_rank(self) -> float:
        """exp(−Σ p_k ln p_k) (Roy and Vetterli, EUSIPCO 2007); 0 for a zero delta."""
        if not self.rank:
            return 0.0
        p = self.values[: self.rank] / self.values[: self.rank].sum()
        return float((-(p * p.log()).sum()).exp())

    @property
    def stable_rank(self) -> float:
        """Σσ²/σ_1²; 0 for a zero delta."""
        return self.above / float(self.values[0]) ** 2 if self.rank else 0.0

    @property
    def participation(self) -> float:
        """The participation ratio (Σσ²)²/Σσ⁴ of the triplets: an effective number of directions."""
        squares = self.svd.S.square()
        return float(squares.sum().square() / squares.square().sum()) if len(squares) else 0.0

    @property
    def top_share(self) -> float:
        """σ_1/Σσ; 0 for a zero delta."""
        return float(self.values[0] / self.values.sum()) if self.rank else 0.0

    @property
    def top_energy(self) -> float:
        """σ_1²/Σσ²; 0 for a zero delta."""
        return 1 / self.stable_rank if self.rank else 0.0


def spectrum_of(delta: Delta, tensor: TensorContext, eta: float) -> Spectrum | None:
    """Return the spectrum of a delta.

    It is exact for factors, in O((m + n)r²); for a dense delta it uses the kernels of STAR.

    Args:
        delta: τ.
        tensor: The tensor.
        eta: STAR's η, in percent.

    Returns:
        None for tensors that spectral methods average: vectors, and embeddings of full fine-tunes.
    """
    if is_averaged([delta], tensor, embeddings="average"):
        return None
    rounding = rounding_of(delta, tensor)
    energy = delta.frobenius() ** 2

    def look(decomposed: Decomposition) -> Spectrum:
        truncation = truncation_of(decomposed, eta=eta, rounding=rounding)
        values, floor = decomposed.S, truncation.noise
        if floor is not None and floor.applies:
            values = values[: floor.above]
        rank = len(values)
        count = rank
        if not isinstance(delta, LowRank):
            rank = int((values > FLOAT32_NOISE * torch.linalg.vector_norm(values)).sum())
            count = min(rank, max(truncation.rank, LEADING))
        found = decomposed.first(count)
        triplets = SVD(found.U.double(), found.S, found.V.double())
        return Spectrum(values, triplets, truncation, energy, rank)

    return with_exact_fallback(svd(delta), look)
