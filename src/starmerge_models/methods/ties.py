"""TIES: trim, elect signs, merge the entries that agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta
from starmerge_models.methods.kinds.entrywise import EntrywiseMerge, panels, task_sum
from starmerge_models.methods.method import Deltas, TensorContext, Walk, method
from starmerge_models.methods.trim import (
    PASSES,
    Percent,
    Scope,
    global_thresholds,
    thresholds,
    trimmed,
)


@dataclass(frozen=True)
class TiesSurvey:
    """Statistics of the whole model for TIES."""

    thresholds: list[float] | None
    """By task, the magnitude below which entries are dropped; None for thresholds per tensor."""
    majority: float = 0.0
    """The more frequent sign of the elected entries, −1 or 1; 0 in a draw."""


@method("ties")
class Ties(EntrywiseMerge):
    """Trim each task vector, elect a sign for each entry, average the entries that agree.

    τ̂_t is τ_t with all but its k % largest entries set to zero; γ = sgn(Σ_t τ̂_t); the update is
    λ · Σ_{t ∈ A} τ̂_t / Σ_{t ∈ A} |w_t|, where A are the tasks with sgn τ̂_t = γ ≠ 0. Without
    weights, that is the mean over A.

    Where entries cancel exactly, γ is the majority of the signs over the whole model, as in the
    defining repository, or zero, as in the formula (``zero_sign``). Without a majority it is zero.

    Source: arXiv 2306.01708, with its k = 20 and λ = 1; github.com/prateeky2806/ties-merging.
    Differences: the threshold is the ⌈k %⌉-th largest magnitude, where the repository
    keeps one entry more.
    Cost: four passes over the model, one of them over every 17th row (a single pass with
    ``scope=local`` and ``zero_sign=zero``); adapters are expanded to dense panels of rows.
    When to use: task vectors whose entries conflict in sign; full fine-tunes more than adapters.
    """

    k: Percent = 20.0
    scope: Scope = "global"
    lambda_: Annotated[float, Field(description="factor of the merged update")] = 1.0
    zero_sign: Annotated[
        Literal["majority", "zero"],
        Field(description="sign of entries that cancel exactly: the model's majority, or zero"),
    ] = "majority"

    @property
    def passes(self) -> int:
        """See :attr:`Method.passes`."""
        return PASSES * (self.scope == "global") + (self.zero_sign == "majority")

    def survey(self, walk: Walk) -> TiesSurvey:
        """Find the thresholds and the majority of signs; see :meth:`Merge.survey`."""
        found = TiesSurvey(global_thresholds(walk, self.k) if self.scope == "global" else None)
        if self.zero_sign == "zero":
            return found

        def signs(deltas: Deltas, tensor: TensorContext) -> int:
            held = dict(deltas.items())
            floors = thresholds(held, self.k, found.thresholds)
            balance = 0
            for rows in panels(next(iter(held.values())).shape, len(held)):
                tau = (trimmed(delta.entries(rows), floors[t]) for t, delta in held.items())
                elected = task_sum(tau).numpy()
                balance += int(np.count_nonzero(elected > 0) - np.count_nonzero(elected < 0))
            return balance

        majority = sum(walk(signs))
        return TiesSurvey(found.thresholds, float((majority > 0) - (majority < 0)))

    def prepare_tensor(
        self, deltas: dict[int, Delta], tensor: TensorContext, survey: TiesSurvey
    ) -> tuple[dict[int, float], float]:
        """Return the thresholds of the tasks; see :meth:`EntrywiseMerge.prepare_tensor`."""
        return thresholds(deltas, self.k, survey.thresholds), survey.majority

    def merge_entries(
        self, tau: list[Tensor], tasks: tuple[int, ...], tensor: TensorContext, local: Any
    ) -> Tensor:
        """Merge some entries; see :meth:`EntrywiseMerge.merge_entries`."""
        floors, majority = local
        weights = [tensor.weights[t] for t in tasks]
        left = [trimmed(tau_t, floors[t]) for t, tau_t in zip(tasks, tau, strict=True)]
        return elected_mean(left, weights, majority).mul_(self.lambda_)


def elected_mean(
    tau: Sequence[Tensor] | Tensor, weights: Sequence[float], majority: float
) -> Tensor:
    """Elect a sign for each entry and average the tasks' entries that have this sign.

    Args:
        tau: (T', ...) w_t · τ̂_t, float32 or float64.
        weights: (T',) w_t.
        majority: The sign of entries that cancel exactly.

    Returns:
        (...) float64; 0 where no entry has the elected sign.
    """
    # The sign of the sum; the majority's where the sum is zero.
    gamma = task_sum(tau).sign_().to(tau[0].dtype).mul_(2).add_(majority).sign_()
    whole = gamma.new_zeros(gamma.shape, dtype=torch.float64)
    # float32 counts exactly where all weights are ±1.
    alike = all(abs(w) == 1 for w in weights)
    mass = gamma.new_zeros(gamma.shape, dtype=torch.float32 if alike else torch.float64)
    for tau_t, w in zip(tau, weights, strict=True):
        # |τ̂_t| where it has the elected sign, else 0.
        agreeing = torch.mul(tau_t, gamma).clamp_(min=0)
        whole += agreeing
        mass.add_(agreeing.sign_(), alpha=abs(w))
    whole /= mass.clamp_(min=torch.finfo(mass.dtype).tiny)
    # Adding 0 turns −0, where no entry agrees with a negative sign, into 0.
    return whole.mul_(gamma).add_(0.0)
