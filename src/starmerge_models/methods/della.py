"""DELLA: drop entries at random, small ones more often than large ones, and rescale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from starmerge_models.deltas import Delta, Dense
from starmerge_models.errors import UsageError
from starmerge_models.methods.dare import Draws
from starmerge_models.methods.kinds.entrywise import absolute_sum, panel_bytes, panels
from starmerge_models.methods.kinds.masks import keep_probabilities, l1_ratio, masked
from starmerge_models.methods.memory import DeltaShape, TensorShape, dense_shape
from starmerge_models.methods.method import TensorContext, Transform, method
from starmerge_models.spectral import Truncation


@method("della")
class Della(Transform):
    """Drop entries of each task vector at random, by the rank of their magnitude in their row.

    The entry of rank r = 0 … n − 1 of a row is kept with probability
    density − ε + 2ε r / (n − 1); a vector is one row. The kept entries are scaled up: by
    Σ|τ| / Σ|kept τ| over the tensor (``rescale=l1``), or each by one over its probability
    (``rescale=probability``). Any merge can follow: ``della+ties`` with k=100 elects signs as in
    the paper. The choice of dropped entries depends only on seed, model, tensor and index, as for
    ``dare``.

    Source: arXiv 2406.11617 (MagPrune), in which the drop rate is 1 − density, ε is twice the ε
    here, and entries are rescaled by probability; mergekit's della, which has the same ε as here
    and rescales by l1.
    Cost: a sort of each row and one random number per entry; the result is dense.
    When to use: full fine-tunes with large task vectors, instead of ``dare``.
    """

    density: Annotated[
        float, Field(gt=0, le=1, description="mean share of entries that are kept; 1 keeps all")
    ] = 0.5
    epsilon: Annotated[
        float,
        Field(
            ge=0,
            lt=0.5,
            description="added to the keep probability of a row's largest entry, subtracted from "
            "that of its smallest",
        ),
    ] = 0.15
    seed: Annotated[int, Field(ge=0, description="seed of the random choice of entries")] = 0
    rescale: Annotated[
        Literal["l1", "probability"],
        Field(
            description="scale the tensor to its former L1 norm, or each entry by the inverse of "
            "its keep probability"
        ),
    ] = "l1"

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Check density against ε; see :meth:`Method.check`."""
        check_keep_probabilities(self.density, self.epsilon)

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        # A vector is one row: its keys, order, probabilities and draws are computed at once.
        panel = panel_bytes(tensor, 1) if len(tensor.shape) > 1 else 80 * tensor.size
        return 4 * tensor.size + panel

    def result(self, delta: DeltaShape, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Transform.result`."""
        return dense_shape(tensor)

    def apply(
        self, delta: Delta, task: int, tensor: TensorContext, survey: Any
    ) -> tuple[Delta, Truncation | None]:
        """Drop and rescale one delta; see :meth:`Transform.apply`."""
        if self.density == 1 or 0 in delta.shape:
            return delta, None
        draws = Draws(self.seed, tensor.tasks[task], tensor.name)
        left = torch.empty(delta.shape, dtype=torch.float32)
        norm = left_norm = 0.0
        # A vector is one row: its entries are ranked among all of them, so it is one panel.
        whole = [slice(None)] if len(tensor.shape) < 2 else panels(delta.shape)
        for rows in whole:
            entries = delta.entries(rows)
            p = keep_probabilities(entries.reshape(as_rows(tensor)), self.density, self.epsilon)
            m = draws.kept(1 - p.flatten(), p.numel()).view(entries.shape)
            if self.rescale == "l1":
                left[rows] = masked(entries, m)
                norm += absolute_sum(entries)
                left_norm += absolute_sum(left[rows])
            else:
                left[rows] = masked((entries * (1 / p).view(entries.shape)).float(), m)
        if self.rescale == "l1":
            factor = l1_ratio(norm, left_norm)
            for rows in panels(delta.shape):
                left[rows] = left[rows].double() * factor
        return Dense(left), None


def as_rows(tensor: TensorContext) -> tuple[int, int]:
    """Return the matrix shape of a tensor with rows along its last axis; a vector is one row."""
    return (-1, tensor.shape[-1]) if len(tensor.shape) > 1 else (1, -1)


def check_keep_probabilities(density: float, epsilon: float) -> None:
    """Refuse a density and ε that give probabilities outside of 0 to 1.

    Raises:
        UsageError: density − ε or density + ε is not between 0 and 1.
    """
    if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        raise UsageError(
            f"della: with density {density:g} and epsilon {epsilon:g} some entries would stay with "
            f"probability {density - epsilon:g}, some with {density + epsilon:g}. Choose epsilon "
            "below density and below 1 − density."
        )
