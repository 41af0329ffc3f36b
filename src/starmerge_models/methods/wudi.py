"""WUDI: reduce the interference between task vectors by gradient descent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, total
from starmerge_models.methods.kinds.entrywise import panel_bytes, panels
from starmerge_models.methods.kinds.spectral import is_averaged, will_average
from starmerge_models.methods.memory import (
    DeltaShape,
    TensorShape,
    dense_shape,
    total_bytes,
    total_shape,
)
from starmerge_models.methods.method import Deltas, Merge, TensorContext, method, refuse_negative
from starmerge_models.spectral import core_space, on_best_device

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8
"""Adam's decay rates and ε, the values of its paper."""


@method("wudi")
class Wudi(Merge):
    """Start from the sum, and reduce each task's interference from the others by gradient steps.

    The rows of τ_t lie in the space of the task's inputs, so ‖(M − τ_t)τ_tᵀ‖² measures the
    interference on these inputs. M starts as Σ w_t τ_t and is optimised by steps of Adam on
    L = Σ_t w_t ‖(M − τ_t) τ_tᵀ‖²/‖τ_t‖². There is no scale to choose.

    Adam divides each entry's step by the magnitude of its gradients. So M leaves the row space of
    the task vectors, the result is dense, and its distance from the start depends on the ratio of
    the task vectors to ``lr``. Where tasks do not interfere, the gradients are rounding, but the
    steps are still up to ``lr`` long: these entries are accurate to a few ``lr`` only. The exact
    minimum of the same L is ``covariance`` with ``side=input`` and ``ridge=0``, in Core Space and
    in a thousandth of the time.

    Source: arXiv 2503.08099; defining repository github.com/nathanielyvo/WUDI-Merging: 300 steps of
    torch's Adam, lr = 2e-5 in its script for RoBERTa. The default here is the 1e-5 of
    github.com/tanganke/fusion_bench. Differences: float64 arithmetic; weights; vectors, and
    embeddings of full fine-tunes, are averaged, where the repository keeps those of the base.
    Cost: 300 products of the whole matrix with the task vectors' row space, n·R for adapters of
    total rank R and n·n for full fine-tunes: minutes per tensor of 4096 × 4096 even for adapters.
    Memory is bounded by panels of rows, whose steps do not depend on each other.
    When to use: to reproduce the published method, on small models. Otherwise use
    ``covariance+own_response``.
    """

    steps: Annotated[int, Field(ge=0, description="number of steps; 0 leaves the sum")] = 300
    lr: Annotated[float, Field(gt=0, description="learning rate, about the step of an entry")] = (
        1e-5
    )
    embeddings: Annotated[
        Literal["average", "merge"],
        Field(description="how embeddings of full fine-tunes are merged: averaged, or as matrices"),
    ] = "average"

    averages = True

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse negative weights; see :meth:`Method.check`."""
        refuse_negative(self, weights, "the method minimises a weighted sum of squares")

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        if will_average(tensor, embeddings=self.embeddings):
            return tensor.deltas_nbytes + total_bytes(tensor)
        space = tensor.core().as_matrices()
        # The start, R, and two normalised task vectors; G and two of its terms; the panels; the
        # float32 result.
        work = 4 * space.size + 8 * 3 * space.q**2 + panel_bytes(tensor, 0) + 4 * tensor.size
        return tensor.deltas_nbytes + max(space.construction_bytes, space.nbytes + work)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Merge.result`."""
        if will_average(tensor, embeddings=self.embeddings):
            return total_shape(tensor)
        return dense_shape(tensor)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        held = dict(deltas.items())
        if is_averaged(list(held.values()), tensor, embeddings=self.embeddings):
            return total(held.values()).scaled(1 / tensor.total_weight)
        return on_best_device(
            list(held.values()), lambda device: self._minimised(held, tensor, device)
        )

    def _minimised(
        self, held: Mapping[int, Delta], tensor: TensorContext, device: torch.device
    ) -> Delta:
        space = core_space(list(held.values()), device).as_matrices()
        # In Core Space ∇L/2 = M G − R, with G = Σ w_t C_t, R = Σ w_t τ_t C_t, C_t = τ_tᵀτ_t/‖τ_t‖².
        start = torch.zeros_like(space.matrices[0])
        R, G = torch.zeros_like(start), start.new_zeros(start.shape[1], start.shape[1])
        for t, tau_t in zip(held, space.matrices, strict=True):
            if tau_t.any():
                unit = tau_t / torch.linalg.vector_norm(tau_t)
                C_t = unit.T @ unit
                start += tau_t
                G.add_(C_t, alpha=tensor.weights[t])
                R.addmm_(tau_t, C_t)
        merged = torch.empty(space.shape, dtype=torch.float32, device=space.home)
        for rows in panels(space.shape):
            M, R_rows = (X[rows] if space.U is None else space.U[rows] @ X for X in (start, R))
            merged[rows] = self._stepped(M, G, R_rows, space.V).float()
        return Dense(merged)

    def _stepped(self, M: Tensor, G: Tensor, R: Tensor, V: Tensor | None) -> Tensor:
        """Run all steps for some rows; M and R are in the basis V, the result is not."""
        M = M.clone() if V is None else M @ V.T
        first, second = torch.zeros_like(M), torch.zeros_like(M)
        for step in range(1, self.steps + 1):
            gradient = M @ G - R if V is None else ((M @ V) @ G - R) @ V.T
            gradient *= 2
            first.lerp_(gradient, 1 - _BETA_1)
            second.mul_(_BETA_2).addcmul_(gradient, gradient, value=1 - _BETA_2)
            size = (second / (1 - _BETA_2**step)).sqrt_().add_(_EPSILON)
            M.addcdiv_(first, size, value=-self.lr / (1 - _BETA_1**step))
        return M
