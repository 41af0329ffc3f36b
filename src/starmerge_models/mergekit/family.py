"""mergekit's task-arithmetic family: sparsify, weight, elect signs, normalise, scale.

In this order, for each tensor, with d_i = W_i − W_0: δ_i is d_i after the method's sparsification;
x_i = w_i δ_i; with consensus, σ is the sign of Σ x_i (+ for zero), and only entries with
sgn x_i = σ count; the update is λ Σ x_i, or with normalisation λ Σ x_i / Σ w_i, over the counted
entries.

The definitions are mergekit 0.1.5's, which differ from the papers': densities are per tensor,
rescaling keeps the L1 norm, signs are elected after weighting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from starmerge_models.methods.kinds.entrywise import task_sum
from starmerge_models.methods.kinds.masks import largest


@dataclass(frozen=True)
class FamilyMember:
    """One of the family's methods."""

    thinning: Literal["none", "magnitude", "outliers", "random", "ranked"]
    """Kept entries: all, the largest, all but the smallest and outliers, random, random by rank."""
    consensus: bool
    """Whether entries must have the elected sign."""


FAMILY = {
    "task_arithmetic": FamilyMember("none", consensus=False),
    "ties": FamilyMember("magnitude", consensus=True),
    "dare_linear": FamilyMember("random", consensus=False),
    "dare_ties": FamilyMember("random", consensus=True),
    "breadcrumbs": FamilyMember("outliers", consensus=False),
    "breadcrumbs_ties": FamilyMember("outliers", consensus=True),
    "della": FamilyMember("ranked", consensus=True),
    "della_linear": FamilyMember("ranked", consensus=False),
}


def magnitude_mask(delta: Tensor, density: float) -> Tensor:
    """Keep the max(1, ⌊density · n⌋) largest of n entries; no entry with density 0.

    Args:
        delta: (m, n) float32.
        density: Share to keep.

    Returns:
        (m, n) bool. Of equal magnitudes the first are kept, in row-major order.
    """
    return largest(delta, max(1, int(density * delta.numel())) if density > 0 else 0)


def outlier_mask(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Drop the ⌊gamma · n⌋ largest of n entries and keep the ⌊density · n⌋ largest of the others.

    If there are fewer others, fewer outliers are dropped.

    Args:
        delta: (m, n) float32.
        density: Share to keep.
        gamma: Share of outliers.

    Returns:
        (m, n) bool.
    """
    n = delta.numel()
    keep = int(density * n)
    top = min(int(gamma * n), n - keep)
    return largest(delta, top + keep) & ~largest(delta, top)


def merge_sparsified(
    delta: Tensor,
    weights: Sequence[float],
    *,
    total_weight: float,
    consensus: bool,
    normalize: bool,
    lambda_: float,
) -> Tensor:
    """Merge sparsified task vectors.

    Args:
        delta: (T', ...) float64, δ_i of the tasks that change the tensor.
        weights: (T',) w_i.
        total_weight: Σ w_i over all tasks.
        consensus: Whether entries must have the elected sign.
        normalize: Whether to divide by the sum of the counted weights, unless it is zero.
        lambda_: The factor λ.

    Returns:
        The update, (...) float64.
    """
    w = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (delta.ndim - 1))
    x = w * delta
    if consensus:
        sigma = torch.where(task_sum(x) >= 0, 1.0, -1.0)
        agrees = x.sign() == sigma
        merged, mass = task_sum(torch.where(agrees, x, 0.0)), task_sum(agrees * w)
        mass = torch.where(mass == 0, 1.0, mass)
    else:
        merged, mass = task_sum(x), torch.tensor(total_weight, dtype=torch.float64)
        mass = torch.where(mass.abs() < 1e-8, 1.0, mass)
    return lambda_ * (merged / mass if normalize else merged)
