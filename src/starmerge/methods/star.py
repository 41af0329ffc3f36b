"""STAR: Spectral Truncation And Rescale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Field

from starmerge.deltas import Delta, Dense, LowRank, total
from starmerge.methods.method import Merged, Method, TensorContext, method
from starmerge.spectral import Truncation, svd, truncate_and_rescale


@method("star")
class Star(Method):
    """Truncate each task's spectrum, restore its nuclear norm, average.

    For each task: δ = Σ σ_k u_k v_kᵀ; keep the smallest r with σ_1 + … + σ_r ≥ η % of Σσ; rescale
    the kept σ by Σσ / Σ_{k≤r}σ; then take the mean over tasks. Dropping the small singular
    values removes much of what interferes with other tasks and little of the task itself.

    A vector (a norm's weight, a bias) has one singular value, so it is always averaged. So are
    embeddings of full fine-tunes, unless ``embeddings`` says "truncate": their rows are tokens,
    not directions, and their SVD is the largest of the model.

    Source: arXiv 2502.10339, its rank rule and its default η = 40; defining repository
    github.com/IBM/STAR. Different from there: an all-zero delta stays zero instead of NaN, and
    adapters are decomposed exactly, not by a randomised SVD.
    Cost: for adapters O((m + n)r²) a tensor and task; for full fine-tunes an SVD each.
    When to use: several models or more, when averages get blurred; nothing to tune.
    """

    eta: Annotated[
        float, Field(gt=0, le=100, description="share of the nuclear norm to keep, in percent")
    ] = 40.0
    rank: Annotated[
        int | None, Field(ge=1, description="keep this many singular values, instead of eta")
    ] = None
    embeddings: Annotated[
        Literal["average", "truncate"],
        Field(description="what is done with embeddings of full fine-tunes"),
    ] = "average"

    svd_of_dense = True

    def merge(self, deltas: Iterable[Delta], context: TensorContext) -> Merged:
        """Merge one tensor; see :meth:`Method.merge`."""
        truncations: list[Truncation | None] = []

        def truncated() -> Iterator[Delta]:
            for delta in deltas:
                kept, truncation = self._truncate(delta, context)
                truncations.append(truncation)
                del delta  # or it would stand beside the next one
                yield kept
                del kept

        mean = total(truncated()).scaled(1 / context.tasks)
        return Merged(mean, tuple(truncations))

    def _truncate(self, delta: Delta, context: TensorContext) -> tuple[Delta, Truncation | None]:
        if isinstance(delta, Dense) and (
            len(context.shape) < 2 or (context.is_embedding and self.embeddings == "average")
        ):
            return delta, None
        kept, truncation = truncate_and_rescale(svd(delta), eta=self.eta, rank=self.rank)
        # What is kept of a full matrix may have more factor entries than the matrix itself.
        return kept if isinstance(delta, LowRank) else Dense(kept.to_dense()), truncation
