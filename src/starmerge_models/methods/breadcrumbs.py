"""Model Breadcrumbs: task arithmetic without small changes and outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta
from starmerge_models.errors import UsageError
from starmerge_models.methods.kinds.entrywise import EntrywiseMerge, entries_of, task_sum
from starmerge_models.methods.method import TensorContext, method
from starmerge_models.methods.trim import trimmed
from starmerge_models.selection import kth_largest


@method("breadcrumbs")
class Breadcrumbs(EntrywiseMerge):
    """Drop both tails of each task vector's magnitudes, tensor by tensor; then scale the sum.

    Of the n entries of a tensor the ⌊β %⌋ smallest and the ⌊(100 − γ) %⌋ largest are dropped,
    except for entries that equal the last kept one; the update is α times the sum of the kept
    entries.

    Source: arXiv 2312.06795, with β and γ as percentiles of the magnitudes; defining repository
    github.com/rezazzr/breadcrumbs, in which beta is the share kept at the top and gamma the share
    dropped at the top, in each row. mergekit's gamma is (100 − γ) % and its density (γ − β) %.
    Cost: three passes over the entries of all tasks, two of them for order statistics; adapters
    are expanded to dense panels of rows.
    When to use: many tasks, when α cannot be tuned; the method is robust against its choice.
    """

    beta: Annotated[
        float, Field(ge=0, lt=100, description="percentile below which entries are dropped")
    ] = 85.0
    gamma: Annotated[
        float, Field(gt=0, le=100, description="percentile above which entries are dropped")
    ] = 99.3
    alpha: Annotated[float, Field(description="factor of the summed task vectors")] = 0.3

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Check that beta is below gamma; see :meth:`Method.check`."""
        if self.beta >= self.gamma:
            raise UsageError(
                f"breadcrumbs: beta is {self.beta:g} and gamma {self.gamma:g}, so nothing would be "
                "left. Choose beta below gamma."
            )

    def prepare_tensor(
        self, deltas: dict[int, Delta], tensor: TensorContext, survey: Any
    ) -> list[tuple[float, float]]:
        """Return the smallest and the largest magnitude to keep, for each task."""
        return [self._bounds(tau_t) for tau_t in deltas.values()]

    def merge_entries(
        self, tau: list[Tensor], tasks: tuple[int, ...], tensor: TensorContext, local: Any
    ) -> Tensor:
        """Merge some entries; see :meth:`EntrywiseMerge.merge_entries`."""
        left = (
            # Subtract the outliers, which are the entries that hardshrink keeps.
            trimmed(tau_t, least) - torch.hardshrink(tau_t, largest)
            for tau_t, (least, largest) in zip(tau, local, strict=True)
        )
        return task_sum(left).mul_(self.alpha)

    def _bounds(self, delta: Delta) -> tuple[float, float]:
        parts = partial(entries_of, delta)
        n = delta.shape[0] * delta.shape[1]
        low = math.floor(Fraction(str(self.beta)) * n / 100)
        high = math.floor((100 - Fraction(str(self.gamma))) * n / 100)
        return kth_largest(parts, n, n - low), kth_largest(parts, n, high + 1)
