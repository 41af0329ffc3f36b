"""Isotropic merging: sum the task vectors and make all singular values equal."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.methods.kinds.spectral import SpectralMerge
from starmerge_models.methods.method import TensorContext, method
from starmerge_models.spectral import CoreSpace, polar, svd_matrix
from starmerge_models.spectral.core_space import CoreShape
from starmerge_models.spectral.dense import polar_bytes, svd_bytes

Alpha = Annotated[float, Field(description="factor of the merged update")]


@method("iso_c")
class IsoC(SpectralMerge):
    """Sum the task vectors and replace all singular values of the sum by their mean.

    Σ_t τ_t = U Σ Vᵀ; the update is α σ̄ U Vᵀ with σ̄ the mean of the nonzero singular values. For
    adapters, whose sum has a low rank, the directions with zero singular values stay zero and do
    not count in the mean.

    Source: arXiv 2502.04959 (Iso-C); defining repository github.com/danielm1405/iso-merging.
    Equal to the source where the sum has full rank.
    Cost: one SVD, in Core Space for adapters.
    When to use: followed by ``own_response``, which finds the factor that α should be.
    """

    alpha: Alpha = 1.0

    def matrix_memory(self, space: CoreShape) -> int:
        """Return the peak memory in bytes; see :meth:`SpectralMerge.matrix_memory`."""
        # The sum, its singular vectors, the scaled vectors, and the result.
        return 2 * space.size + space.vectors + svd_bytes(space.p, space.q)

    def merge_matrices(
        self, tau: list[Tensor], weights: list[float], space: CoreSpace, tensor: TensorContext
    ) -> Tensor:
        """Merge one tensor; see :meth:`SpectralMerge.merge_matrices`."""
        summed = svd_matrix(sum_of(tau), space.floor)
        return self.alpha * summed.S.sum() / max(1, len(summed.S)) * summed.U @ summed.V.T


@method("iso_cts")
class IsoCts(SpectralMerge):
    """Flatten the spectrum of a common subspace and of s directions of each task.

    Of the R directions of Σ_t τ_t = U Σ Vᵀ, the first R − T s are the common subspace U_c, and the
    last T s are replaced: each task contributes the first s triplets of τ_t − U_c U_cᵀ τ_t. The
    vectors of all these triplets are made orthogonal by their polar factors, and the singular
    values are replaced by their mean: the update is α σ̄ U⊥ V⊥ᵀ. With k_0 = ⌊R · common⌋, s is
    (R − k_0)/T, rounded, and at most ⌊R/T⌋.

    Source: arXiv 2502.04959 (Iso-CTS), with its common = 0.8; defining repository
    github.com/danielm1405/iso-merging, where R is min(m, n).
    Cost: one SVD per task and three more, in Core Space for adapters.
    When to use: instead of ``iso_c`` for many tasks.
    """

    alpha: Alpha = 1.0
    common: Annotated[
        float, Field(ge=0, le=1, description="share of the directions that are common to all tasks")
    ] = 0.8

    def matrix_memory(self, space: CoreShape) -> int:
        """Return the peak memory in bytes; see :meth:`SpectralMerge.matrix_memory`."""
        # The sum, the residuals and the result; the vectors of the sum and of each residual, their
        # concatenation, and its polar factors.
        matrices, vectors = space.count + 3, space.count + 3
        sides = polar_bytes(space.p, min(space.p, space.q)), polar_bytes(space.q, space.p)
        work = max(svd_bytes(space.p, space.q), *sides)
        return matrices * space.size + vectors * space.vectors + work

    def merge_matrices(
        self, tau: list[Tensor], weights: list[float], space: CoreSpace, tensor: TensorContext
    ) -> Tensor:
        """Merge one tensor; see :meth:`SpectralMerge.merge_matrices`."""
        summed, T = svd_matrix(sum_of(tau), space.floor), len(tau)
        R = len(summed.S)
        s = min(R // T, round((R - int(R * self.common)) / T))
        common = summed.first(R - T * s)
        residuals = [tau_t - common.U @ (common.U.T @ tau_t) for tau_t in tau]
        own = [svd_matrix(residual, space.floor).first(s) for residual in residuals]
        U = torch.cat([*(svd.U for svd in own), common.U], dim=1)
        V = torch.cat([*(svd.V for svd in own), common.V], dim=1)
        S = torch.cat([*(svd.S for svd in own), common.S])
        level = self.alpha * S.sum() / max(1, len(S))
        return level * polar(U, space.noise) @ polar(V, space.noise).T


def sum_of(tau: list[Tensor]) -> Tensor:
    """Return Σ_t τ_t, accumulated in one buffer."""
    summed = tau[0].clone()
    for tau_t in tau[1:]:
        summed += tau_t
    return summed
