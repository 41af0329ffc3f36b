"""The merge that starmerge takes by itself, by the kind of the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starmerge.deltas import Delta
from starmerge.methods.denoise import Denoise
from starmerge.methods.method import Deltas, Merge, Method, TensorContext, method
from starmerge.methods.shares import Shares


@dataclass(frozen=True)
class Choice:
    """The chain that :class:`Auto` stands for, and why."""

    steps: tuple[Method, ...]
    reason: str
    """One sentence, for terminal, report and card."""


@method("auto")
class Auto(Merge):
    """Take the merge that keeps most, as far as starmerge knows, for the models at hand.

    For adapters that is ``shares``, for full fine-tunes ``denoise+shares``: no other method was
    better in the studies of docs/results.md, for 2 to 16 models, of one origin or of many, on some
    modules or on all. The rest is found in the task vectors by ``shares`` itself: which
    directions several tasks use, and how much the merge must be scaled down for it. So a merge with
    ``auto`` is one with that chain: report and card name the chain, and not ``auto``.

    Source: our own.
    Cost: that of the chain.
    When to use: always, to begin with.
    """

    def choose(self, *, has_dense: bool) -> Choice:
        """Return the chain for some models.

        Args:
            has_dense: Whether one of them is a full fine-tune.
        """
        if has_dense:
            return Choice(
                (Denoise(), Shares()),
                "auto takes denoise+shares: it keeps most of full fine-tunes, and the rounding of "
                "their stored weights has to go first.",
            )
        return Choice((Shares(),), "auto takes shares: it keeps most of adapters.")

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Never called: the chain that is chosen merges."""
        raise AssertionError("a merge begins with the chain that auto chooses")
