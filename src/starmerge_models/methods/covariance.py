"""Covariance-weighted merging: RegMean without data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.methods.kinds.spectral import SpectralMerge
from starmerge_models.methods.method import TensorContext, method, refuse_negative
from starmerge_models.spectral import CoreSpace
from starmerge_models.spectral.core_space import CoreShape


@method("covariance")
class Covariance(SpectralMerge):
    """Weight the tasks in each direction by covariances estimated from their own updates.

    M minimises Σ_t w_t ‖(M − τ_t) C_t^½‖², with C_t = τ_tᵀτ_t/‖τ_t‖² in place of the covariance of
    the task's inputs: M = (Σ w_t τ_t C_t)(Σ w_t C_t + ρ c I)⁻¹, c being the mean eigenvalue of
    Σ w_t C_t. That is the input side; the output side uses C_t = τ_tτ_tᵀ/‖τ_t‖² from the left.
    ``side="auto"`` chooses for each tensor the side on which the tasks overlap more, that is where
    the mean cosine of pairs of C_t is larger.

    Source: the objective is that of arXiv 2503.08099, the closed form that of RegMean (arXiv
    2212.09849), rediscovered in arXiv 2603.02945 and 2604.01329; ridge and choice of side are our
    own.
    Cost: one eigendecomposition per tensor, in Core Space for adapters.
    When to use: adapters of any origin, followed by ``own_response``.
    """

    side: Annotated[
        Literal["auto", "input", "output"],
        Field(description="side of the weights whose covariance is estimated"),
    ] = "auto"
    ridge: Annotated[
        float,
        Field(ge=0, description="ρ, as a share of the mean eigenvalue; 0 takes the pseudo-inverse"),
    ] = 0.1

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse negative weights; see :meth:`Method.check`."""
        refuse_negative(self, weights, "the method minimises a weighted sum of squares")

    def matrix_memory(self, space: CoreShape) -> int:
        """Return the peak memory in bytes; see :meth:`SpectralMerge.matrix_memory`."""
        # A normalised matrix for each task; the sum of the products, the last product, and
        # temporaries of the result. On the chosen side: a covariance, the sum of covariances, and
        # three matrices for LAPACK's dsyevd.
        sides = {"input": space.q, "output": space.p, "auto": max(space.p, space.q)}
        return (space.count + 5) * space.size + 8 * 5 * sides[self.side] ** 2

    def merge_matrices(
        self, tau: list[Tensor], weights: list[float], space: CoreSpace, tensor: TensorContext
    ) -> Tensor:
        """Merge one tensor; see :meth:`SpectralMerge.merge_matrices`."""
        side = overlapping_side(tau) if self.side == "auto" else self.side
        if side == "output":
            return self._solve([C.T for C in tau], weights, space.shape[0]).T
        return self._solve(tau, weights, space.shape[1])

    def _solve(self, tau: list[Tensor], weights: list[float], n: int) -> Tensor:
        """Return M for the input side; tau are multiplied by weights, n is the tensor's width."""
        size = tau[0].shape[1]
        G, right = tau[0].new_zeros(size, size), torch.zeros_like(tau[0])
        for w, tau_t in zip(weights, tau, strict=True):
            unit = tau_t / torch.linalg.vector_norm(tau_t)
            C_t = unit.T @ unit
            G.add_(C_t, alpha=w)
            right.addmm_(tau_t, C_t)
        values, Q = torch.linalg.eigh(G)
        ridge = self.ridge * float(G.trace()) / n
        # Drop directions that no task uses, also without a ridge.
        inverse = torch.where(values > 1e-12 * values.max(), 1 / (values + ridge), 0.0)
        merged: Tensor = (right @ Q * inverse) @ Q.T
        return merged


def overlapping_side(tau: list[Tensor]) -> Literal["input", "output"]:
    """Return the side on which the tasks overlap more; see :class:`Covariance`.

    If the overlaps are equal up to rounding, it is the input side.
    """
    unit = [tau_t / torch.linalg.vector_norm(tau_t) for tau_t in tau]
    of_inputs, of_outputs = mean_cosine(unit), mean_cosine([tau_t.T for tau_t in unit])
    return "input" if of_inputs >= of_outputs - 1e-9 else "output"


def mean_cosine(unit: list[Tensor]) -> float:
    """Return the mean cosine ⟨C_s, C_t⟩/(‖C_s‖ ‖C_t‖) over pairs, for C_t = τ_tᵀτ_t.

    Args:
        unit: (m, n) float64 each, τ_t of norm 1.
    """
    T, (m, n) = len(unit), unit[0].shape
    if T < 2:
        return 0.0
    if n <= m:
        # ‖Σ Ĉ_t‖² = T + Σ_{s≠t} ⟨Ĉ_s, Ĉ_t⟩ for Ĉ_t = C_t/‖C_t‖.
        summed = unit[0].new_zeros(n, n)
        for tau_t in unit:
            C_t = tau_t.T @ tau_t
            summed += C_t / torch.linalg.vector_norm(C_t)
        return (float(summed.square().sum()) - T) / (T * (T - 1))
    # ⟨C_s, C_t⟩ = ‖τ_s τ_tᵀ‖² uses smaller matrices.
    size = [float(torch.linalg.vector_norm(tau_t @ tau_t.T)) for tau_t in unit]
    cosines = [
        float((unit[s] @ unit[t].T).square().sum()) / (size[s] * size[t])
        for s, t in combinations(range(T), 2)
    ]
    return sum(cosines) / len(cosines)
