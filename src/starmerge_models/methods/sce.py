"""SCE: select the entries that differ between models, calculate shares, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta, Dense
from starmerge_models.methods.kinds.entrywise import panel_bytes, panels, task_sum
from starmerge_models.methods.kinds.masks import largest, masked
from starmerge_models.methods.memory import DeltaShape, TensorShape, dense_shape
from starmerge_models.methods.method import Deltas, Merge, TensorContext, method, refuse_weights

_LEAST_MASS = 1e-6
"""Lower bound of the sum of agreeing shares, to avoid a division by zero."""


@method("sce")
class Sce(Merge):
    """Keep the entries that vary most between the tasks, and average those of the elected sign.

    In each tensor, of the entries whose variance over the T tasks is not zero, the share
    ``select_topk`` with the largest variance is kept (with 1, all entries); ties go to the first.
    Task t has the share ω_t ∝ mean(τ_t²) over the kept entries; γ is the sign of Σ_t τ_t, + where
    the sum is zero; the update is Σ_{t ∈ A} ω_t τ_t / Σ_{t ∈ A} ω_t over the tasks A with
    sgn τ_t = γ.

    Source: FuseChat-3.0's SCE, arXiv 2408.07990; mergekit's sce. As in mergekit, all ω_t are 1/T
    where Σ_t mean(τ_t²) is below a ``floor``, which holds for most fine-tunes; the paper has no
    floor (0).
    Cost: three passes over the entries of all tasks; adapters are expanded to dense panels of rows.
    When to use: full fine-tunes that learned different things.
    """

    select_topk: Annotated[
        float, Field(ge=0, le=1, description="share to keep of the entries that differ")
    ] = 1.0
    floor: Annotated[
        float, Field(ge=0, description="sum of mean squares below which all shares are equal")
    ] = 1e-6

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse weights; see :meth:`Method.check`."""
        refuse_weights(self, tasks, weights, "the tasks' shares come from their energies")

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        # The result; if entries are selected, also the variance, its magnitudes and two masks.
        selecting = 0 if self.select_topk == 1 else 10 * tensor.size
        return tensor.deltas_nbytes + panel_bytes(tensor) + 4 * tensor.size + selecting

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Merge.result`."""
        return dense_shape(tensor)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        held, count = list(deltas), len(tensor.tasks)
        shape = held[0].shape
        mask = self._selected(held, count)

        def selected(delta: Delta, rows: slice) -> Tensor:
            entries = delta.entries(rows)
            return entries if mask is None else masked(entries, mask[rows])

        energies = [
            math.fsum(_energy(selected(delta, rows)) for rows in panels(shape)) for delta in held
        ]
        size = max(1, shape[0] * shape[1])
        omega = self._shares([energy / size for energy in energies], count)
        merged = torch.empty(shape, dtype=torch.float32)
        for rows in panels(shape, len(held)):
            merged[rows] = _agreeing_mean([selected(delta, rows) for delta in held], omega)
        return Dense(merged)

    def _selected(self, deltas: list[Delta], count: int) -> Tensor | None:
        """Return a mask of the entries with the largest variance over ``count`` tasks.

        Returns:
            (m, n) bool; None if all entries are kept.
        """
        if self.select_topk == 1:
            return None
        shape = deltas[0].shape
        variance = torch.empty(shape, dtype=torch.float32)
        for rows in panels(shape, len(deltas)):
            tau = [delta.entries(rows) for delta in deltas]
            mean = task_sum(tau).div_(count)
            squares = task_sum((tau_t - mean).square_() for tau_t in tau)
            # The entries of tasks that do not change the tensor are zero.
            squares += mean.square_().mul_(count - len(deltas))
            variance[rows] = squares.div_(count)
        different = int(torch.count_nonzero(variance))
        return largest(variance, math.floor(Fraction(str(self.select_topk)) * different))

    def _shares(self, energies: list[float], count: int) -> list[float]:
        """Return ω_t of the tasks that change the tensor, given their mean squares."""
        whole = sum(energies)
        if whole < self.floor or whole == 0:
            return [1 / count] * len(energies)
        return [energy / whole for energy in energies]


def _energy(entries: Tensor) -> float:
    """Return Σx², in float64; NumPy adds in an order that no number of threads changes."""
    return float(np.square(entries.numpy(), dtype=np.float64).sum())


def _agreeing_mean(tau: list[Tensor], omega: list[float]) -> Tensor:
    """Return Σ_{t ∈ A} ω_t τ_t / Σ_{t ∈ A} ω_t, for tau (rows, n) float32 each."""
    # The sign of the sum; + where the sum is zero.
    gamma = task_sum(tau).sign_().float().mul_(2).add_(1).sign_()
    whole = torch.zeros(gamma.shape, dtype=torch.float64)
    mass = torch.zeros(gamma.shape, dtype=torch.float64)
    for tau_t, omega_t in zip(tau, omega, strict=True):
        agreeing = torch.mul(tau_t, gamma).clamp_(min=0)
        whole += agreeing.double().mul_(omega_t)
        mass.add_(agreeing.sign_(), alpha=omega_t)
    whole /= mass.clamp_(min=_LEAST_MASS)
    return whole.mul_(gamma)
