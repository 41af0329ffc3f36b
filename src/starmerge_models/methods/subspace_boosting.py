"""Subspace Boosting: small singular values of a merged update, lifted."""

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
    """Lift the small singular values of a merge, where sums bury the tasks' own directions.

    M = U Σ Vᵀ is what was merged, and r the least with σ_1 + … + σ_r ≥ β Σσ; every σ_k becomes
    max(σ_k, σ_r). What the tasks share adds up in a sum and what is one task's own does not, so
    that few directions are left of many models (rank collapse).

    The published β is small: where σ_1 alone is that share of Σσ, as in any merge of adapters of
    less than 1/β directions, all singular values become σ_1. A larger β lifts less, β = 1 nothing.

    Directions that M does not have, σ ≤ 1e-6 ‖M‖, stay away: adapters' sums have a low rank, and
    beyond it the vectors are any. Vectors, and embeddings of full fine-tunes, are left as they are.

    Source: arXiv 2506.16506; defining repository github.com/ronskoro/Subspace-Boosting; the rule
    and β = 0.01 as github.com/tanganke/fusion_bench has them. Different from there: directions that
    M does not have are not lifted, query, key and value in one matrix are not taken apart, and all
    matrices are boosted, not those of attention and MLP alone.
    Cost: an SVD a tensor, of factors where the merge is low-rank.
    When to use: after sums such as ``task_arithmetic``, for many tasks, with ``own_response`` after
    it, since it makes the update larger. Refused after ``iso_c`` and ``iso_cts``, which leave
    nothing to lift.
    """

    beta: Annotated[
        float, Field(gt=0, le=1, description="share of Σσ, β, up to which none is lifted")
    ] = 0.01

    def check_merge(self, merge: Merge) -> None:
        """Refuse merges with a flat spectrum; see :meth:`PostStep.check_merge`."""
        if isinstance(merge, IsoC | IsoCts):
            raise UsageError(
                f"subspace_boosting: all singular values of what {merge.name} makes are equal, so "
                "none is to be lifted. Leave subspace_boosting out."
            )

    def memory(self, tensor: TensorShape) -> int:
        """Tell the bytes needed; see :meth:`Method.memory`."""
        seen = self._seen(tensor)
        if will_average(seen, embeddings="average"):
            return 0
        space = seen.core()
        # The SVD of the update; its vectors with other values, and the result.
        work = svd_bytes(space.p, space.q) + space.vectors + space.size
        return max(space.making, space.nbytes + work + space.leaving)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Tell what is made; see :meth:`PostStep.result`."""
        seen = self._seen(tensor)
        if will_average(seen, embeddings="average"):
            return scaled_shape(tensor)
        space = seen.core()
        return DeltaShape(space.rank, space.result)

    def apply(self, merged: Delta, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Lift one tensor's singular values; see :meth:`PostStep.apply`."""
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

    def _seen(self, tensor: TensorShape) -> TensorShape:
        """Return the tensor with all that is looked at: the update alone."""
        return replace(tensor, deltas=(scaled_shape(tensor),))
