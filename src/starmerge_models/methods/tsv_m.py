"""TSV-Merge: task singular vectors, made orthogonal across tasks."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.methods.kinds.spectral import CoreSpaceMerge
from starmerge_models.methods.method import TensorContext, method
from starmerge_models.spectral import CoreSpace, polar
from starmerge_models.spectral.coordinates import Coordinates
from starmerge_models.spectral.core_space import CoreShape
from starmerge_models.spectral.dense import polar_bytes


@method("tsv_m")
class TsvM(CoreSpaceMerge):
    """Concatenate the tasks' leading singular vectors and make them orthogonal.

    τ_t = U_t Σ_t V_tᵀ, the first k triplets of each; U = [U_1 … U_T], Σ = diag(Σ_1 … Σ_T),
    V = [V_1 … V_T]; U⊥ and V⊥ are the polar factors of U and V; the update is α U⊥ Σ V⊥ᵀ. The
    updates of tasks that share directions no longer add up in these directions.

    ``triplets="share"`` keeps ⌊min(m, n)/T⌋ triplets of each task that changes the tensor, as in
    the paper, or fewer for a task of lower rank, so that adapters usually keep all triplets.

    Source: arXiv 2412.00081; defining repository github.com/AntoAndGar/task_singular_vectors.
    Differences: directions that no task has are dropped, where the repository includes arbitrary
    ones chosen by LAPACK.
    Cost: one SVD per task, from the factors for adapters, and two of all kept vectors, in Core
    Space for adapters.
    When to use: adapters of independent origin, whose directions overlap little.
    """

    alpha: Annotated[float, Field(description="factor of the merged update")] = 1.0
    triplets: Annotated[
        Literal["share", "all"] | Annotated[int, Field(ge=1)],
        Field(description="triplets kept of each task: share, all, or a number"),
    ] = "share"

    def matrix_memory(self, space: CoreShape) -> int:
        """Return the peak memory in bytes; see :meth:`CoreSpaceMerge.matrix_memory`."""
        # The vectors of each task; the c kept vectors of all tasks, concatenated, their polar
        # factors, and the scaled factors; the result.
        c = sum(min(rank, self._kept(space.shape, space.count)) for rank in space.ranks)
        side = max(space.p, space.q)
        kept = 8 * 3 * c * (space.p + space.q)
        work = kept + 2 * space.size + polar_bytes(side, c)
        return space.svds + max(space.svd_peak_bytes, work)

    def merge_coordinates(
        self,
        tau: list[Coordinates],
        weights: list[float],
        space: CoreSpace,
        tensor: TensorContext,
    ) -> Tensor:
        """Merge one tensor; see :meth:`CoreSpaceMerge.merge_coordinates`."""
        k, floor = self._kept(space.shape, len(tau)), space.floor
        svds = [C.svd(floor).first(k) for C in tau]
        U = torch.cat([svd.U for svd in svds], dim=1)
        S = torch.cat([svd.S for svd in svds])
        V = torch.cat([svd.V for svd in svds], dim=1)
        return self.alpha * (polar(U, space.noise) * S) @ polar(V, space.noise).T

    def _kept(self, shape: tuple[int, int], T: int) -> int:
        """Return the largest number of triplets that is kept of each of T tasks."""
        size = min(shape)
        share = {"share": max(1, size // T), "all": size}
        return int(share.get(str(self.triplets), self.triplets))
