"""SCE: select what differs between the models, calculate their shares, erase minorities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from starmerge.deltas import Delta, Dense
from starmerge.methods.entrywise import panels, stacked, task_sum
from starmerge.methods.masks import largest
from starmerge.methods.method import Deltas, Merge, TensorContext, method, refuse_weights

_LEAST_MASS = 1e-6
"""What the agreeing shares are not taken below."""


@method("sce")
class Sce(Merge):
    """Keep the entries that vary most between the tasks, and average those of the elected sign.

    Tensor by tensor: of the entries whose variance over the T tasks is not zero, the share
    ``select_topk`` with the largest variance stays (with 1, everything); of equal ones the first.
    Task t has the share ω_t ∝ mean(τ_t²) of what stays; γ is the sign of Σ_t τ_t, + where it is
    zero; the update is Σ_{t ∈ A} ω_t τ_t / Σ_{t ∈ A} ω_t over the tasks A with sgn τ_t = γ.

    Source: FuseChat-3.0's SCE, arXiv 2408.07990; mergekit's sce. As there, all ω_t are 1/T where
    Σ_t mean(τ_t²) is below a ``floor``, which holds for most fine-tunes; the paper has none (0).
    Cost: three passes over the entries of all tasks side by side; adapters become dense.
    When to use: full fine-tunes that learned different things.
    """

    select_topk: Annotated[
        float, Field(ge=0, le=1, description="share of the entries that differ to keep")
    ] = 1.0
    floor: Annotated[
        float, Field(ge=0, description="sum of mean squares below which all tasks count alike")
    ] = 1e-6

    holds_all = True
    makes_dense = True

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse weights; see :meth:`Method.check`."""
        refuse_weights(self, tasks, weights, "the tasks' shares come from their energies")

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        held, count = list(deltas), len(tensor.tasks)
        mask = self._selected(held, count)
        shape = mask.shape[0], mask.shape[1]

        def selected(rows: slice) -> Tensor:
            return torch.where(mask[rows], stacked(held, rows), 0.0)

        energies = torch.zeros(len(held), dtype=torch.float64)
        for rows in panels(shape, len(held)):
            energies += selected(rows).square().sum((1, 2))
        omega = self._shares(energies / max(1, mask.numel()), count)
        merged = torch.empty(shape)
        for rows in panels(shape, len(held)):
            merged[rows] = _agreeing_mean(selected(rows), omega).float()
        return Dense(merged)

    def _selected(self, deltas: list[Delta], count: int) -> Tensor:
        """Return where the variance over ``count`` tasks is among the largest, (m, n) bool."""
        shape = deltas[0].shape
        if self.select_topk == 1:
            return torch.ones(shape, dtype=torch.bool)
        variance = torch.empty(shape)
        for rows in panels(shape, len(deltas)):
            tau = stacked(deltas, rows)
            mean = task_sum(tau) / count
            # The other tasks leave the tensor alone: their entries are zero.
            absent = (count - len(deltas)) * mean.square()
            variance[rows] = ((task_sum((tau - mean).square()) + absent) / count).float()
        different = int(torch.count_nonzero(variance))
        return largest(variance, math.floor(Fraction(str(self.select_topk)) * different))

    def _shares(self, energies: Tensor, count: int) -> Tensor:
        """Return ω_t of the tasks that change the tensor, (T',), given their mean squares."""
        whole = float(energies.sum())
        if whole < self.floor or whole == 0:
            return torch.full_like(energies, 1 / count)
        return energies / whole


def _agreeing_mean(tau: Tensor, omega: Tensor) -> Tensor:
    """Return Σ_{t ∈ A} ω_t τ_t / Σ_{t ∈ A} ω_t for tau (T', rows, n)."""
    gamma = torch.where(task_sum(tau) >= 0, 1.0, -1.0)
    shares = omega[:, None, None] * (tau.sign() == gamma)
    return task_sum(shares * tau) / task_sum(shares).clamp(min=_LEAST_MASS)
