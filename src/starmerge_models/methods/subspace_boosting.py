"""Subspace Boosting: raise the small singular values of a merged update."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field

from starmerge_models.deltas import Delta
from starmerge_models.errors import UsageError
from starmerge_models.methods.iso import IsoC, IsoCts
from starmerge_models.methods.kinds.spectral import is_averaged, will_average
from starmerge_models.methods.memory import DeltaShape, TensorShape, scaled_shape
from starmerge_models.methods.method import Deltas, Merge, PostStep, TensorContext, method
from starmerge_models.spectral import core_space, kept_rank, on_best_device, svd_matrix
from starmerge_models.spectral.core_space import FLOAT32_NOISE
from starmerge_models.spectral.dense import svd_bytes


@method("subspace_boosting")
class SubspaceBoosting(PostStep):
    """Raise the small singular values of a merge, which hold the tasks' own directions.

    M = U Σ Vᵀ is the merged update, and r the least with σ_1 + … + σ_r ≥ β Σσ; every σ_k becomes
    max(σ_k, σ_r). Directions that tasks share add up in a sum, and directions of one task do not,
    so that a sum of many models is dominated by few directions (rank collapse).

    The published β is small: where σ_1 alone is that share of Σσ, as in any merge of adapters with
    fewer than 1/β directions, all singular values become σ_1. A larger β raises less, β = 1
    nothing.

    Singular values σ ≤ 1e-6 ‖M‖ are dropped instead of raised: sums of adapters have a low rank,
    and the singular vectors beyond it are arbitrary. Vectors, and embeddings of full fine-tunes,
    are unchanged.

    Source: arXiv 2506.16506; defining repository github.com/ronskoro/Subspace-Boosting; the rule
    and β = 0.01 are those of github.com/tanganke/fusion_bench. Differences: zero singular values
    are not raised, query, key and value in one matrix are not separated, and all matrices are
    boosted, not only those of attention and MLP.
    Cost: one SVD per tensor, from the factors if the merge is low-rank.
    When to use: after sums such as ``task_arithmetic``, for many tasks, followed by
    ``own_response``, because the step makes the update larger. Refused after ``iso_c`` and
    ``iso_cts``, whose singular values are all equal.
    """

    beta: Annotated[
        float,
        Field(gt=0, le=1, description="β, the share of Σσ whose singular values are not raised"),
    ] = 0.01

    def check_merge(self, merge: Merge) -> None:
        """Refuse merges with a flat spectrum; see :meth:`PostStep.check_merge`."""
        if isinstance(merge, IsoC | IsoCts):
            raise UsageError(
                f"subspace_boosting: all singular values of what {merge.name} makes are equal, so "
                "none is to be lifted. Leave subspace_boosting out."
            )

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        seen = self._of_update(tensor)
        if will_average(seen, embeddings="average"):
            return 0
        space = seen.core()
        # The SVD of the update, its vectors times the new values, and the result.
        work = svd_bytes(space.p, space.q) + space.vectors + space.size
        return max(space.construction_bytes, space.nbytes + work + space.result_peak_bytes)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`PostStep.result`."""
        seen = self._of_update(tensor)
        if will_average(seen, embeddings="average"):
            return scaled_shape(tensor)
        space = seen.core()
        return DeltaShape(space.rank, space.result)

    def apply(self, merged: Delta, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Raise the singular values of one tensor; see :meth:`PostStep.apply`."""
        if is_averaged([merged], tensor, embeddings="average"):
            return merged

        def boosted(device: torch.device) -> Delta:
            space = core_space([merged], device)
            (M,) = space.matrices
            svd = svd_matrix(M, FLOAT32_NOISE * float(torch.linalg.vector_norm(M)))
            r = kept_rank(svd.S, 100 * self.beta)
            if r == len(svd.S):
                return merged
            return space.delta((svd.U * svd.S.clamp(min=svd.S[r - 1])) @ svd.V.T)

        return on_best_device([merged], boosted)

    def _of_update(self, tensor: TensorShape) -> TensorShape:
        """Return the shapes of a tensor whose only delta is the update."""
        return replace(tensor, deltas=(scaled_shape(tensor),))
