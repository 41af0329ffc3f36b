"""TALL-masks: consensus task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.errors import UsageError
from starmerge_models.methods.kinds.entrywise import EntrywiseMerge, task_sum
from starmerge_models.methods.method import TensorContext, method


@method("tall_masks")
class TallMasks(EntrywiseMerge):
    """Task arithmetic on the entries that several tasks need.

    Task t needs an entry if |τ_t| > λ |τ_MTL − τ_t|, where τ_MTL = Σ τ_t. Entries that fewer than
    ``min_tasks`` tasks need are dropped: by default those that no task or a single task needs. The
    update is α Σ τ_t on the remaining entries.

    ``mtl="scaled"`` uses τ_MTL = α Σ τ_t, as in STAR's scripts, which keeps nearly all entries.

    Source: arXiv 2405.07813 (Consensus Task Arithmetic); defining repository
    github.com/nik-dim/tall_masks, where λ is chosen for each task on validation data, from 0.2 to
    0.6, and α too.
    Cost: one pass; adapters are expanded to dense panels of rows.
    When to use: many tasks, some of which change entries to the harm of the others.
    """

    lambda_: Annotated[
        float, Field(ge=0, description="λ, the share of the other tasks' sum an entry must exceed")
    ] = 0.4
    alpha: Annotated[float, Field(description="factor of the summed task vectors")] = 0.4
    min_tasks: Annotated[
        int, Field(ge=1, description="least number of tasks that need an entry")
    ] = 2
    mtl: Annotated[Literal["unscaled", "scaled"], Field(description="τ_MTL: Σ τ_t, or α Σ τ_t")] = (
        "unscaled"
    )

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Check ``min_tasks`` against the number of models; see :meth:`Method.check`."""
        if self.min_tasks > len(tasks):
            raise UsageError(
                f"tall_masks: min_tasks is {self.min_tasks}, and there are {len(tasks)} models, so "
                "nothing would be left. Lower min_tasks."
            )

    def merge_entries(
        self, tau: list[Tensor], tasks: tuple[int, ...], tensor: TensorContext, local: Any
    ) -> Tensor:
        """Merge some entries; see :meth:`EntrywiseMerge.merge_entries`."""
        tau_sum = task_sum(tau)
        tau_mtl = self.alpha * tau_sum if self.mtl == "scaled" else tau_sum
        needing = np.zeros(tau_sum.shape, dtype=np.int32)
        for tau_t in tau:
            rest = (tau_mtl - tau_t).abs_().mul_(self.lambda_)
            needing += tau_t.abs().numpy() > rest.numpy()
        return (tau_sum * self.alpha).mul_(torch.from_numpy(needing >= self.min_tasks))
