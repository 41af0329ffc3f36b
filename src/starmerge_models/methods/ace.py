"""ACE-Merging: adaptive covariance estimation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta, LowRank
from starmerge_models.methods.iso import sum_of
from starmerge_models.methods.kinds.spectral import SpectralMerge
from starmerge_models.methods.memory import DeltaShape, TensorShape
from starmerge_models.methods.method import TensorContext, method
from starmerge_models.spectral import CoreSpace, core_space, svd_matrix
from starmerge_models.spectral.core_space import CoreShape
from starmerge_models.spectral.dense import svd_bytes
from starmerge_models.spectral.metric import Whitening


@method("ace")
class Ace(SpectralMerge):
    """Weight the tasks by covariances of their inputs, estimated from their updates.

    W̃_t = τ_t − 1 μ_tᵀ with the column means μ_t = τ_tᵀ1/m; Ŝ_t = W̃_tᵀW̃_t. The tasks count as
    heterogeneous if Var[log‖τ_t‖²]/(E[log‖τ_t‖²])² > γ. Then S̃_t = Ŝ_t/tr Ŝ_t, with ε/tr Ŝ_t on
    the diagonal of S_t, and the prior is divided by the mean ‖τ_t‖²; else S̃_t = Ŝ_t with ε. Every
    row of the prior C is the mean of the rows of ΣS̃_t. W = (Σ W̃_t S_t)(Σ S_t + C)⁻¹.
    For heterogeneous tasks a spectral refinement follows: the first 30 % of the triplets of
    W + Σ τ_t(S̃_t − S̄), all with their mean σ, are added to W.

    Source: arXiv 2603.02945, equations 5 to 19, following its repository github.com/unravel-xu/
    ACE-Merging, which uses the unbiased variance. Differences: tasks whose rows are all equal are
    left out, and the share of the triplets refers to the nonzero ones.
    The method depends on the scale of the weights: ε is absolute, so that for small updates the
    result is nearly the average of W̃_t.
    Cost: one linear solve and one SVD per tensor, in Core Space for adapters.
    When to use: for comparison; ``covariance`` has the same objective without absolute scales.
    """

    gamma: Annotated[
        float, Field(ge=0, description="heterogeneity from which tasks are normalised")
    ] = 0.3
    epsilon: Annotated[float, Field(gt=0, description="regularisation of each covariance")] = 0.01
    top: Annotated[
        float, Field(ge=0, le=1, description="share of the triplets in the spectral refinement")
    ] = 0.3

    # The prior depends on the vector of ones, which rotations of the inputs change: another square
    # root of Σ would give another merge.
    uses_metric = False

    def space(
        self, deltas: Sequence[Delta], device: torch.device, whitening: Whitening | None
    ) -> CoreSpace:
        """Return a space that also contains the vectors of ones, which the means need."""
        m, n = deltas[0].shape
        one_m, one_n = (torch.ones(shape, dtype=torch.float32) for shape in ((m, 1), (1, n)))
        space = core_space([*deltas, LowRank(one_m, one_n)], device, whitening).as_matrices()
        return replace(space, tasks=space.tasks[:-1])

    def core_shape(self, tensor: TensorShape) -> CoreShape:
        """Return the sizes of the space with the vectors of ones; see :meth:`space`."""
        return tensor.core(DeltaShape(1)).as_matrices()

    def matrix_memory(self, space: CoreShape) -> int:
        """Return the peak memory in bytes; see :meth:`SpectralMerge.matrix_memory`."""
        # Centred matrices, and the products of these and of the task vectors with the covariances;
        # three covariances for each task, and six for sums, the solver and the prior.
        covariances = 8 * (3 * space.count + 6) * space.q**2
        matrices = (3 * space.count + 6) * space.size
        return matrices + covariances + svd_bytes(space.p, space.q) + space.vectors

    def merge_matrices(
        self, tau: list[Tensor], weights: list[float], space: CoreSpace, tensor: TensorContext
    ) -> Tensor:
        """Merge one tensor; see :meth:`SpectralMerge.merge_matrices`."""
        m, n = space.shape
        one_m, one_n = _ones(space.U, tau[0].new_ones(m)), _ones(space.V, tau[0].new_ones(n))
        centred = [tau_t - torch.outer(one_m, one_m @ tau_t) / m for tau_t in tau]
        norms = [space.noise * torch.linalg.vector_norm(tau_t) for tau_t in tau]
        kept = [t for t, W_t in enumerate(centred) if torch.linalg.vector_norm(W_t) > norms[t]]
        if not kept:
            return torch.zeros_like(tau[0])
        tau, centred = [tau[t] for t in kept], [centred[t] for t in kept]
        energies = torch.stack([tau_t.square().sum() for tau_t in tau])
        logs = energies.log()
        # Not divided by the mean, which is 0 for unit task vectors.
        heterogeneous = len(kept) > 1 and bool(logs.var() > self.gamma * logs.mean().square())

        S_hat = [W_t.T @ W_t for W_t in centred]
        scale = [float(S.trace()) if heterogeneous else 1.0 for S in S_hat]
        S_tilde = [S / s for S, s in zip(S_hat, scale, strict=True)]
        I = torch.eye(len(one_n), dtype=one_n.dtype, device=one_n.device)  # noqa: E741
        S = [S_t + self.epsilon / s * I for S_t, s in zip(S_tilde, scale, strict=True)]
        prior = torch.outer(one_n, one_n @ sum_of(S_tilde)) / n
        if heterogeneous:
            prior /= energies.mean()
        right = sum_of([W_t @ S_t for W_t, S_t in zip(centred, S, strict=True)])
        W: Tensor = torch.linalg.solve(sum_of(S) + prior, right, left=False)
        if not heterogeneous:
            return W
        mean = sum_of(S) / len(kept)
        change = sum_of([tau_t @ (S_t - mean) for tau_t, S_t in zip(tau, S_tilde, strict=True)])
        refined = svd_matrix(W + change, space.noise * float(torch.linalg.vector_norm(W + change)))
        top = refined.first(int(self.top * len(refined.S)))
        refinement: Tensor = top.S.sum() / max(1, len(top.S)) * top.U @ top.V.T
        return W + refinement


def _ones(basis: Tensor | None, ones: Tensor) -> Tensor:
    """Return a vector of ones in a basis that spans it."""
    return ones if basis is None else basis.T @ ones
