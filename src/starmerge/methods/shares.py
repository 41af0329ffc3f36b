"""Two-sided shares: each task speaks where both the inputs and the outputs are its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge.deltas import Delta, LowRank, outer
from starmerge.errors import UsageError
from starmerge.methods.method import Deltas, TensorContext, Walk, method
from starmerge.methods.own_response import Response, factor_to, own_products, own_responses
from starmerge.methods.spectral_merge import SpectralMerge, is_averaged
from starmerge.spectral import CoreSpace, svd_matrix
from starmerge.spectral.core_space import CANCELLED


@method("shares")
class Shares(SpectralMerge):
    """Give each task its share of every input direction and of every output direction.

    C_t = τ_tᵀτ_t/‖τ_t‖² says how strongly task t uses each input direction of a tensor, and
    P_t = τ_tτ_tᵀ/‖τ_t‖² each output direction. With S_C = Σ_t w_t C_t + ρ c I, c being the mean
    eigenvalue of Σ_t w_t C_t, the task's share of the inputs is R_t = w_t C_t S_C⁻¹, and that of
    the outputs is L_t = w_t S_P⁻¹ P_t. Over the tasks both sum to almost I. The update is

        M = f · Σ_t L_tᵖ τ_t R_tᵖ,  ½ ≤ p ≤ 1,

    where R_tᵖ = W⁻¹ (W w_t C_t W)ᵖ W with W = S_C^(-½), and L_tᵖ likewise. A direction that one
    task alone uses stays whole, and one that all tasks use alike is averaged. A tensor that a
    single task changes stays that task's. The weights w_t decide how directions that several tasks
    use are divided; a common factor of them cancels.

    The own response of a task is r_t = ⟨M, τ_t⟩/‖τ_t‖² over all matrices of the model; the tasks'
    differ by a few percent. The factor f makes their mean the number ``response``. By default f is
    the geometric mean of two factors: of f_1 = 1/mean(r_t), with which the tasks find all of
    themselves in M, and of f_2, which minimises Σ_t w_t ‖(f_2 M − τ_t) C_t^½‖²/‖τ_t C_t^½‖²: on the
    inputs of task t, M comes nearest to τ_t. Both are 1 for tasks that are equal or share no
    direction; the more the tasks disagree, the smaller is f_2. Where tasks oppose each other so
    much that one of the two is not positive, f is 1.

    Source: our own; docs/results.md has the evidence. ``covariance`` uses one of the two sides, and
    ``tsv_m`` makes the directions of the tasks orthogonal but divides none of them.
    Cost: an SVD a task, of r_t triplets, and two eigendecompositions a tensor, in Core Space for
    adapters; all of it twice, as the factor is found first.
    When to use: adapters of any origin and number. Full fine-tunes: ``denoise+shares``. If a task
    vector is many times smaller than the others, f_2 is ruled by it and the merge comes out too
    small: give ``response``.
    """

    power: Annotated[
        float, Field(ge=0.5, le=1, description="p, the power of the shares, from 0.5 to 1")
    ] = 0.5
    ridge: Annotated[
        float, Field(ge=0, description="ρ, as a share of the mean eigenvalue; 0: pseudo-inverse")
    ] = 0.1
    response: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="mean own response of the tasks; auto: by how much they disagree"),
    ] = "auto"

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse negative weights; see :meth:`Method.check`."""
        if min(weights) < 0:
            raise UsageError(
                "shares: a weight is negative, and a share of a direction is none. Give weights "
                "from 0 up."
            )

    def survey(self, walk: Walk) -> Response:
        """Measure the own responses of the tasks; see :meth:`Merge.survey`."""

        def products(deltas: Deltas, tensor: TensorContext) -> Tensor:
            held = {t: delta for t, delta in deltas.items() if tensor.weights[t]}
            if not held or is_averaged(list(held.values()), tensor, embeddings=self.embeddings):
                return torch.cat([own_products(_NOTHING, (), tensor), _no_inputs(tensor)])
            merged = super(Shares, self).merge(Deltas.of(held), tensor, None)
            own = {t: delta.scaled(1 / tensor.weights[t]) for t, delta in held.items()}
            inputs = self._on_inputs(merged, own, tensor)
            return torch.cat([own_products(merged, own.items(), tensor), inputs])

        found = list(walk(products))
        responses, count, mean = own_responses((rows[:3] for rows in found), self.name)
        if count == 0:  # no matrix is changed
            return Response(responses, 1.0)
        if self.response != "auto":
            remedy = "Leave response out"
            return Response(responses, factor_to(self.response, mean, self.name, remedy))
        agreeing, own, merged = torch.stack(found)[:, 3:].sum(0)
        # Factors whose terms cancel leave rounding, which is no input to come near on.
        weights, alive = found[0][2], own > CANCELLED**2 * own.max()
        share = (weights / torch.where(alive, own, torch.inf))[alive]
        agreement = float((share * agreeing[alive]).sum())
        if mean <= 0 or agreement <= 0:  # the tasks oppose each other
            return Response(responses, 1.0)
        nearest = agreement / float((share * merged[alive]).sum())
        return Response(responses, math.sqrt(nearest / mean))

    def _on_inputs(
        self, merged: Delta, deltas: Mapping[int, Delta], tensor: TensorContext
    ) -> Tensor:
        """Return ⟨M, τ_t⟩, ‖τ_t‖² and ‖M‖² on the inputs of each task, (3, T) float64.

        ⟨X, Y⟩ on these inputs is tr(X C_t Yᵀ) = ⟨X τ_tᵀ, Y τ_tᵀ⟩/‖τ_t‖².
        """
        found = _no_inputs(tensor)
        if self.response == "auto":
            for t, tau_t in deltas.items():
                energy = tau_t.frobenius() ** 2
                if energy:
                    of_merged, of_task = outer(merged, tau_t), outer(tau_t, tau_t)
                    found[0, t] = of_merged.inner(of_task) / energy
                    found[1, t] = of_task.frobenius() ** 2 / energy
                    found[2, t] = of_merged.frobenius() ** 2 / energy
        return found

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Response) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        merged = super().merge(deltas, tensor, None)
        averaged = is_averaged(list(deltas), tensor, embeddings=self.embeddings)
        return merged if averaged else merged.scaled(survey.factor)

    def merge_matrices(
        self, tau: list[Tensor], weights: list[float], space: CoreSpace, tensor: TensorContext
    ) -> Tensor:
        """Merge one tensor; see :meth:`SpectralMerge.merge_matrices`."""
        if len(tau) == 1:
            return tau[0] / weights[0]
        norms = [float(torch.linalg.vector_norm(tau_t)) for tau_t in tau]
        svds = [svd_matrix(C, space.noise * norm) for C, norm in zip(tau, norms, strict=True)]
        # √w_t σ_k/‖τ_t‖, the roots of the eigenvalues of w_t C_t and of w_t P_t.
        roots = [w**0.5 * svd.S / norm for w, svd, norm in zip(weights, svds, norms, strict=True)]
        rows = self._weigh([svd.V for svd in svds], roots)
        columns = self._weigh([svd.U for svd in svds], roots)
        merged = torch.zeros_like(tau[0])
        for w, svd, root, right, left in zip(weights, svds, roots, rows, columns, strict=True):
            # L_tᵖ τ_t R_tᵖ, of which U_t and V_t have cancelled.
            merged.addmm_(left.T * (root * svd.S / w * root), right)
        return merged

    def _weigh(self, vectors: list[Tensor], roots: list[Tensor]) -> list[Tensor]:
        """Return (X Xᵀ)^(p−1) X W of each task, (r_t, q), for one side of the tensor.

        With X = D V_tᵀ W, where D² holds the nonzero eigenvalues of w_t C_t and V_t their vectors,
        R_tᵖ = W⁻¹ Xᵀ (X Xᵀ)^(p−1) X W: a root of r_t × r_t in place of one of q × q.

        Args:
            vectors: V_t (q, r_t) of each task, or U_t for the output side.
            roots: The diagonal of D (r_t,) of each task.
        """
        factors = [(V * root).T for V, root in zip(vectors, roots, strict=True)]
        stacked = torch.cat(factors)
        values, Q = torch.linalg.eigh(stacked.T @ stacked)
        ridge = self.ridge * float(values.sum()) / min(stacked.shape)
        # Directions that no task has have no share, also when there is no ridge.
        known = values > 1e-12 * values.max()
        W = (Q * torch.where(known, values + ridge, torch.inf).rsqrt()) @ Q.T
        weighed = []
        for factor in factors:
            X = factor @ W
            if self.power != 1:
                P, s, Qh = torch.linalg.svd(X, full_matrices=False)
                X = (P * torch.where(s > 1e-12 * s[:1], s ** (2 * self.power - 1), 0.0)) @ Qh
            weighed.append(X @ W)
        return weighed


def _no_inputs(tensor: TensorContext) -> Tensor:
    return torch.zeros(3, len(tensor.tasks), dtype=torch.float64)


_NOTHING = LowRank(torch.zeros(1, 0), torch.zeros(0, 1))
"""Stands for the merge of a tensor that has no task vectors to respond."""
