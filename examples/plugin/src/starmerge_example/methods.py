"""The median of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.methods.kinds.entrywise import EntrywiseMerge
from starmerge_models.methods.method import TensorContext, method, refuse_weights


@method("median")
class Median(EntrywiseMerge):
    """The median of the task vectors, entry by entry, times a factor.

    Models that leave a tensor alone count as zeros. With an even number of models it is the mean of
    the middle two.

    Cost: one pass; adapters become dense panel by panel.
    When to use: many models, of which a few differ wildly from the others.
    """

    alpha: Annotated[float, Field(description="factor of the median")] = 1.0

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse weights: a median has none."""
        refuse_weights(self, tasks, weights, "a median counts every model once")

    def merge_entries(
        self, tau: list[Tensor], tasks: tuple[int, ...], tensor: TensorContext, local: Any
    ) -> Tensor:
        """Merge some entries, (rows, n) of each task that changes the tensor."""
        absent = len(tensor.tasks) - len(tau)
        entries = torch.stack([*tau, *[torch.zeros_like(tau[0])] * absent]).double()
        return entries.quantile(0.5, dim=0) * self.alpha
