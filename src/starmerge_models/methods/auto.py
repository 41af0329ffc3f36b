"""The default method: a chain chosen by the kind of the models and the metric."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from starmerge_models.deltas import Delta
from starmerge_models.methods.denoise import Denoise
from starmerge_models.methods.memory import TensorShape
from starmerge_models.methods.method import Deltas, Merge, Method, TensorContext, method
from starmerge_models.methods.own_response import OwnResponse
from starmerge_models.methods.regmean import RegMean
from starmerge_models.methods.shares import Shares
from starmerge_models.methods.tsv_m import TsvM


@dataclass(frozen=True)
class Choice:
    """The chain that :class:`Auto` chooses, with the reason."""

    steps: tuple[Method, ...]
    reason: str
    """One sentence, shown on the terminal, in the report and on the model card."""


@method("auto")
class Auto(Merge):
    """Choose the chain that keeps most of the tasks, by measurements, for the given models.

    The choice is ``shares`` for adapters and ``denoise+shares`` for full fine-tunes;
    ``tsv_m+own_response`` with a metric of the inputs, and ``regmean`` with a metric that has
    prompts of every task. docs/results.md has the evidence. These methods compute the shares of the
    tasks in each direction, and the scale of the merge, from the task vectors. Report and card name
    the chosen chain, not ``auto``.

    Source: our own.
    Cost: that of the chain.
    When to use: as the first choice.
    """

    def choose(
        self, models: Sequence[str] = (), *, has_dense: bool, prompts: Collection[str] | None = None
    ) -> Choice:
        """Return the chain for some models.

        Args:
            models: Their names.
            has_dense: Whether one of them is a full fine-tune.
            prompts: Names of the models whose prompts the metric has moments of; None for a merge
                without a metric.
        """
        before: tuple[Method, ...] = (Denoise(),) if has_dense else ()
        kind = "models that hold whole tensors" if has_dense else "adapters alone"
        lacking = [model for model in models if prompts is not None and model not in prompts]
        if prompts is None:
            steps, why = (*before, Shares()), "nothing is known of the inputs"
        elif prompts and not lacking:
            steps, why = (RegMean(),), "there are prompts of every task"
        else:
            steps, why = (*before, TsvM(), OwnResponse()), "there is a metric of the inputs"
            if prompts:
                why += f", without prompts of {', '.join(lacking)}"
        name = "+".join(step.name for step in steps)
        return Choice(steps, f"auto takes {name}: there are {kind}, and {why}.")

    def memory(self, tensor: TensorShape) -> int:
        """Never called: a merge runs the chosen chain."""
        raise AssertionError("a merge begins with the chain that auto chooses")

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Never called: a merge runs the chosen chain."""
        raise AssertionError("a merge begins with the chain that auto chooses")
