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
    """Scale the merged update by depth: little in the first layers, most in the last.

    The update of layer l of L, counted from 0, is multiplied by α + β l/(L − 1); what belongs to
    no layer (embeddings, the last norm, the output head) by α. The first layers hold general
    features, which a task changes to little use and other tasks need as they were.

    Without values, both come from the task vectors: α = ‖Σ τ_t‖₁/(T ‖M‖₁), norms over the whole
    model, so that the first layers have the strength of the average whatever the merge's own is;
    β = 1 − α, at least 0, so that the last layer keeps the merge. After ``average`` that changes
    nothing: give β there, or an α below 1.

    Source: arXiv 2410.17146, the scaling and α; defining repository github.com/wang-kee/LiNeS.
    Different from there: it tunes β on validation data where several tasks are merged, and sets
    β = 1 − α for one model alone; that rule is the default here. Σ w_t τ_t and Σ w_t stand for
    Σ τ_t and T. Stacks of layers, such as an encoder's and a decoder's, have an L each, and a stack
    of one layer has the factor α.
    Cost: the merge is made twice, once to look, and then each of its entries and of the sum's is
    looked at; with α given, none. What is low-rank stays so.
    When to use: after sums and ``ties``, for many tasks; to give a fine-tune's general abilities
    back, merge it alone with an α below 1.
    """

    alpha: Annotated[
        float | None,
        Field(ge=0, description="factor of the first layer; without a value from the norms"),
    ] = None
    beta: Annotated[
        float | None,
        Field(ge=0, description="what the last layer has more; without a value 1 − α, at least 0"),
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
        """Tell the bytes needed; see :meth:`Method.memory`."""
        # The sum of the task vectors, each scaled before it is added, to compare with.
        summed = 0 if self.alpha is not None else tensor.one_by_one + total_bytes(tensor)
        return max(scaled_shape(tensor).nbytes, summed + panel_bytes(tensor, 1, numbers=4))

    @property
    def passes(self) -> int:
        """See :attr:`Method.passes`."""
        return 1 if self.alpha is None else 0

    def survey(self, walk: MergedWalk) -> Slope:
        """Find α and β; see :meth:`PostStep.survey`."""
        alpha = self._alpha(walk) if self.alpha is None else self.alpha
        return Slope(alpha, max(0.0, 1 - alpha) if self.beta is None else self.beta)

    def _alpha(self, walk: MergedWalk) -> float:
        def norms(merged: Delta, deltas: Deltas, tensor: TensorContext) -> tuple[float, float]:
            summed = total(tau_t.scaled(tensor.weights[t]) for t, tau_t in deltas.items())
            mean = _one_norm(summed) / abs(tensor.total_weight)
            return mean, _one_norm(merged)

        of_mean, of_merged = (sum(found) for found in zip(*walk(norms), strict=True))
        # Of a merge that is zero any factor will do.
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
