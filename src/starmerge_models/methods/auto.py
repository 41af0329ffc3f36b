"""The merge that starmerge takes by itself, by the kind of the models."""

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
    """The chain that :class:`Auto` stands for, and why."""

    steps: tuple[Method, ...]
    reason: str
    """One sentence, for terminal, report and card."""


@method("auto")
class Auto(Merge):
    """Take the merge that keeps most, as far as starmerge knows, for the models at hand.

    For adapters that is ``shares``, for full fine-tunes ``denoise+shares``; with a metric of the
    inputs ``tsv_m+own_response``, and with one that has prompts of every task ``regmean``.
    docs/results.md has the evidence. How much of each direction is whose, and by how much the merge
    must be scaled down, these methods find in the task vectors. A merge with ``auto`` is one with
    that chain: report and card name the chain, and not ``auto``.

    Source: our own.
    Cost: that of the chain.
    When to use: always, to begin with.
    """

    def choose(
        self, models: Sequence[str] = (), *, has_dense: bool, prompts: Collection[str] | None = None
    ) -> Choice:
        """Return the chain for some models.

        Args:
            models: Their names.
            has_dense: Whether one of them is a full fine-tune.
            prompts: Those of whose prompts the metric has moments; None: there is no metric.
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
        """Never called: the chain that is chosen tells what it needs."""
        raise AssertionError("a merge begins with the chain that auto chooses")

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Never called: the chain that is chosen merges."""
        raise AssertionError("a merge begins with the chain that auto chooses")
