"""How much of each task a merge keeps: its response to the task's inputs.

On the inputs of task i, with second moments C_i
(:mod:`starmerge_models.study.inspection.conflict`), a merge M should equal τ_i. There M is the sum
of own · τ_i and a remainder orthogonal to τ_i:

    own = ⟨M C_i, τ_i⟩/⟨τ_i C_i, τ_i⟩,  others² = ‖(M − own · τ_i) C_i^½‖²/‖τ_i C_i^½‖²,

and the relative error of M is √((1 − own)² + others²). A small ``own`` means that the merge weakens
the task; a large ``others``, that other tasks interfere on its inputs.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, LowRank
from starmerge_models.study.inspection.spectrum import Spectrum


@dataclass(frozen=True)
class Kept:
    """Sums over tensors that compare a merge M with τ_i; the sums of several tensors add up."""

    inner: float = 0.0
    """⟨M, τ_i⟩."""
    energy: float = 0.0
    """‖τ_i‖²."""
    merged: float = 0.0
    """‖M‖²."""
    along: float = 0.0
    """⟨M C_i, τ_i⟩."""
    own: float = 0.0
    """‖τ_i C_i^½‖²."""
    response: float = 0.0
    """‖M C_i^½‖²."""
    inside: float = 0.0
    """‖U_iU_iᵀ M V_iV_iᵀ‖², for the singular vectors that STAR keeps of τ_i."""

    def __add__(self, other: Kept) -> Kept:
        """Return the sums over the tensors of both."""
        return Kept(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def record(self) -> dict[str, float | None]:
        """Return the ratios as JSON-serialisable data; None if undefined."""
        own = _ratio(self.along, self.own)
        response = _ratio(self.response, self.own)
        others = error = None
        if own is not None and response is not None:
            # Rounding errors may make the difference negative.
            others = math.sqrt(max(0.0, response - own**2))
            error = math.hypot(1 - own, others)
        return {
            "coefficient": _ratio(self.inner, self.energy),
            "own": own,
            "others": others,
            "error": error,
            "inside": _ratio(self.inside, self.merged),
        }


def kept_of(merged: Delta, delta: Delta, spectrum: Spectrum | None) -> Kept:
    """Compare the merge of one tensor with one task.

    Args:
        merged: M.
        delta: τ_i.
        spectrum: The spectrum of τ_i; None for tensors that spectral methods average.
    """
    inner, energy = merged.inner(delta), delta.frobenius() ** 2
    squares = merged.frobenius() ** 2
    if spectrum is None or not spectrum.rank:
        return Kept(inner, energy, squares)
    U, S, V = spectrum.svd.U, spectrum.svd.S, spectrum.svd.V
    MV = _times(merged, V)
    C = S.square() / S.square().sum()
    products = (U * MV).sum(0)  # u_lᵀ M v_l
    r = spectrum.kept
    inside = torch.linalg.matrix_norm(U[:, :r].T @ MV[:, :r])
    return Kept(
        inner,
        energy,
        squares,
        along=float((C * S * products).sum()),
        own=float((C * S.square()).sum()),
        response=float((C * MV.square().sum(0)).sum()),
        inside=float(inside) ** 2,
    )


def _times(delta: Delta, V: Tensor) -> Tensor:
    """Return δ V, float64; the product with a dense delta is computed in the delta's dtype."""
    if isinstance(delta, LowRank):
        return delta.scale * (delta.B.double() @ (delta.A.double() @ V))
    matrix = delta.matrix
    return (matrix @ V.to(matrix.dtype)).double()


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
