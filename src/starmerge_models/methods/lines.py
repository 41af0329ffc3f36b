"""LiNeS: layer-increasing network scaling of a merged update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from starmerge_models.deltas import Delta, total
from starmerge_models.errors import UsageError
from starmerge_models.methods.kinds.entrywise import absolute_sum, entries_of, panel_bytes
from starmerge_models.methods.memory import TensorShape, scaled_shape, total_bytes
from starmerge_models.methods.method import (
    Deltas,
    MergedWalk,
    PostStep,
    TensorContext,
    method,
    sums_to_zero,
)


@dataclass(frozen=True)
class Slope:
    """The factors of the layers, from α at the first to α + β at the last."""

    alpha: float
    beta: float


@method("lines")
class Lines(PostStep):
    """Scale the merged update by depth: least in the first layers, most in the last.

    The update of layer l of L, counted from 0, is multiplied by α + β l/(L − 1), and that of
    tensors outside of layers (embeddings, the last norm, the output head) by α. The first layers
    hold general features: changing them helps one task little and harms the other tasks.

    By default both come from the task vectors. α = ‖Σ τ_t‖₁/(T ‖M‖₁), with norms over the whole
    model, gives the first layers the strength of an average, whatever the scale of the merge.
    β = 1 − α, but at least 0, leaves the last layer unchanged. After ``average`` these defaults
    change nothing: set β, or an α below 1.

    Source: arXiv 2410.17146, the scaling and α; defining repository github.com/wang-kee/LiNeS.
    Differences: the repository tunes β on validation data for merges of several tasks, and sets
    β = 1 − α for a single model; that rule is the default here. Σ w_t τ_t and Σ w_t replace
    Σ τ_t and T. Each stack of layers, such as an encoder and a decoder, has its own L, and a stack
    of one layer has the factor α.
    Cost: the merge runs twice, the first time to compute α from all entries of the merge and of
    the sum; no extra cost with α given. Low-rank updates stay low-rank.
    When to use: after sums and ``ties``, for many tasks; to restore the general abilities of one
    fine-tune, merge it alone with an α below 1.
    """

    alpha: Annotated[
        float | None,
        Field(ge=0, description="factor of the first layer; by default computed from the norms"),
    ] = None
    beta: Annotated[
        float | None,
        Field(ge=0, description="added to α in the last layer; by default 1 − α, at least 0"),
    ] = None

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse weights that sum to zero; see :meth:`Method.check`."""
        if self.alpha is None and sums_to_zero(weights):
            raise UsageError(
                "lines: the weights sum to zero, and α is found by dividing by their sum. Change "
                "one, or give alpha."
            )

    def check_tensors(self, merged: Sequence[TensorContext], left: Sequence[TensorContext]) -> None:
        """Refuse a model without layers; see :meth:`Method.check_tensors`."""
        if all(tensor.layer is None for tensor in merged):
            raise UsageError(
                "lines: no tensor that is merged is known to belong to a layer, a number in its "
                "name; of deltas in memory none is. Merge files of a model with layers, or what "
                "load_task_vectors reads of them."
            )

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        # The sum of the task vectors, each of them scaled before it is added.
        summed = 0 if self.alpha is not None else tensor.largest_delta_nbytes + total_bytes(tensor)
        return max(scaled_shape(tensor).nbytes, summed + panel_bytes(tensor, 1, numbers=4))

    @property
    def passes(self) -> int:
        """See :attr:`Method.passes`."""
        return 1 if self.alpha is None else 0

    def survey(self, walk: MergedWalk) -> Slope:
        """Compute α and β; see :meth:`PostStep.survey`."""
        alpha = self._alpha(walk) if self.alpha is None else self.alpha
        return Slope(alpha, max(0.0, 1 - alpha) if self.beta is None else self.beta)

    def _alpha(self, walk: MergedWalk) -> float:
        def norms(merged: Delta, deltas: Deltas, tensor: TensorContext) -> tuple[float, float]:
            summed = total(tau_t.scaled(tensor.weights[t]) for t, tau_t in deltas.items())
            mean = _one_norm(summed) / abs(tensor.total_weight)
            return mean, _one_norm(merged)

        of_mean, of_merged = (sum(found) for found in zip(*walk(norms), strict=True))
        # The factor of a zero merge is arbitrary.
        return of_mean / of_merged if of_merged else 1.0

    def apply(self, merged: Delta, deltas: Deltas, tensor: TensorContext, survey: Slope) -> Delta:
        """Scale one tensor; see :meth:`PostStep.apply`."""
        if tensor.layer is None:
            return merged.scaled(survey.alpha)
        layer, count = tensor.layer
        return merged.scaled(survey.alpha + survey.beta * layer / max(1, count - 1))


def _one_norm(delta: Delta) -> float:
    """Return Σ|x| over the entries."""
    return sum(map(absolute_sum, entries_of(delta)))
