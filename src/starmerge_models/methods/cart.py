"""CART: low-rank approximations of the task vectors around their mean."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Dense
from starmerge_models.methods.iso import sum_of
from starmerge_models.methods.kinds.spectral import SpectralMerge
from starmerge_models.methods.method import TensorContext, method
from starmerge_models.spectral import CoreSpace, Decomposition, svd_dense, with_exact_fallback
from starmerge_models.spectral.core_space import CoreShape
from starmerge_models.spectral.gram import svd_dense_bytes


@method("cart")
class Cart(SpectralMerge):
    """Average, and add the leading directions in which each task differs from the mean.

    The update is τ̄ + λ Σ_t trunc_k(w_t (τ_t − τ̄)), τ̄ = Σ w_t τ_t / Σ w_t, where trunc_k keeps the
    first k singular triplets. A task that does not change the tensor counts with τ_t = 0.

    A fraction as ``rank`` refers to the rank of the residual, which in the paper is min(m, n). A
    fraction of min(m, n) would keep the whole residuals of adapters, and these sum to zero.

    Source: arXiv 2412.12153; defining repository github.com/JH-GEECS/CART. Its λ is tuned on
    validation data; about 8 % of the rank is best throughout the paper.
    Cost: one SVD per task, in Core Space for adapters.
    When to use: tasks that share much, so that their mean is a good starting point.
    """

    rank: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.08, description="triplets kept of each residual: a fraction or a number"
    )
    lambda_: Annotated[float, Field(description="factor of the truncated residuals")] = 1.0

    def matrix_memory(self, space: CoreShape) -> int:
        """Return the peak memory in bytes; see :meth:`SpectralMerge.matrix_memory`."""
        # The mean, residuals, truncated residuals, their stack, its sum, and the result.
        matrices = 3 * (space.count + 1) + 3
        work = svd_dense_bytes(space.p, space.q, 8) + 2 * space.vectors
        return matrices * space.size + work

    def merge_matrices(
        self, tau: list[Tensor], weights: list[float], space: CoreSpace, tensor: TensorContext
    ) -> Tensor:
        """Merge one tensor; see :meth:`SpectralMerge.merge_matrices`."""
        mean = sum_of(tau) / tensor.total_weight
        residuals = [tau_t - w * mean for w, tau_t in zip(weights, tau, strict=True)]
        # Tasks with τ_t = 0 have the residual −w_t τ̄; one term covers all, as trunc_k is linear in
        # the scale.
        residuals.append((sum(weights) - tensor.total_weight) * mean)
        return mean + self.lambda_ * torch.stack(
            [self._truncated(R, space) for R in residuals]
        ).sum(0)

    def _truncated(self, residual: Tensor, space: CoreSpace) -> Tensor:
        def first(decomposed: Decomposition) -> Tensor:
            share = self.rank if isinstance(self.rank, int) else self.rank * len(decomposed.S)
            kept = decomposed.first(max(1, int(share)))
            return (kept.U * kept.S) @ kept.V.T

        return with_exact_fallback(svd_dense(Dense(residual), space.floor), first)
