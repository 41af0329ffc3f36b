"""The error of a merged adapter at each rank, computed before an adapter is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from starmerge_models.checkpoints.lora.file import Module
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.merging.engine import MergeRun
from starmerge_models.merging.executors.executor import Executor
from starmerge_models.merging.layout import PlannedTensor
from starmerge_models.merging.outputs import Finished, Slot
from starmerge_models.merging.outputs.adapter import AdapterOutput
from starmerge_models.merging.outputs.places import AdapterPlace, places_of
from starmerge_models.merging.plan import Plan
from starmerge_models.methods.pipeline import Merged
from starmerge_models.spectral import svd

ERRORS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
"""Relative errors for which the ranks are computed."""


@dataclass(frozen=True)
class RankCost:
    """The error of an adapter of a given rank."""

    rank: int
    error: float
    """‖Δ − Δ_r‖ / ‖Δ‖ in the Frobenius norm, over the whole model."""

    @property
    def kept(self) -> float:
        """Kept share of the update's energy, 1 − error²."""
        return 1 - self.error**2


def rank_costs(
    plan: Plan, executor: AbstractContextManager[Executor], *, progress: bool = False
) -> list[RankCost]:
    """Merge without writing an output, and return the lowest rank for each of :data:`ERRORS`.

    Cost: that of the merge, and the singular values of every update.

    Args:
        plan: A plan of an adapter.
        executor: As for :func:`starmerge_models.merging.engine.run`.
        progress: Show a progress bar on standard error.

    Returns:
        One entry per rank, ascending; the last is the lowest rank of the smallest possible error.
        Errors that no rank reaches, because of vectors and tied embeddings, are left out.

    Raises:
        StarmergeError: As for :func:`starmerge_models.merging.engine.run`.
    """
    assert isinstance(plan.output, AdapterOutput)
    # The measurement needs all singular values, so the output has no limit of the rank.
    measuring = AdapterOutput(plan.output.wanted_dtype)
    with executor as workers:
        merging = MergeRun(replace(plan, output=measuring), workers, progress)
        merging.write(_Spectra(places_of(plan)))
    return _costs(merging.records)


def _costs(records: Sequence[Mapping[str, Any]]) -> list[RankCost]:
    spectra = [torch.tensor(record["spectrum"], dtype=torch.float64) for record in records]
    height = max(map(len, spectra), default=0)
    energies = torch.zeros(height, dtype=torch.float64)
    for S in spectra:
        energies[: len(S)] += S.square()
    outside = math.fsum(r["update_norm"] ** 2 for r in records if r["is_left_out"])
    # The lost energy at each rank, summed from the smallest values.
    lost = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)]) + outside
    whole = math.fsum(r["update_norm"] ** 2 for r in records if r["is_whole"])
    if not float(lost[0]) + whole:
        return []
    errors = (lost / (lost[0] + whole)).sqrt()
    least = max(1, int((errors > errors[-1] + 1e-7).sum()))
    ranks = {max(1, int((errors > error).sum())) for error in ERRORS if float(errors[-1]) <= error}
    return [RankCost(r, float(errors[r])) for r in sorted(ranks | {least}) if r <= height]


@dataclass(frozen=True)
class _Spectra:
    """A writer that records the spectra of updates instead of writing an adapter."""

    where: Mapping[str, AdapterPlace]

    def slots(self, tensor: PlannedTensor) -> list[Slot]:
        """Return no slots."""
        return []

    def leave(self, tensor: PlannedTensor) -> str:
        """Never called: an adapter does not contain unchanged tensors."""
        raise AssertionError(f"{tensor.source.name} has no place in an adapter.")

    def put(self, tensor: PlannedTensor, base: Tensor | None, merged: Merged) -> dict[str, Any]:
        """Return the norm of an update, and its singular values if it is stored as factors."""
        place = self.where[tensor.source.name]
        if isinstance(place, Module):
            update = merged.delta
            if isinstance(update, LowRank) and update.rank > min(update.shape):
                update = Dense(update.entries())  # takes less memory than that many factors
            S = svd(update).S
            spectrum, norm = S.tolist(), float(S.norm())
        else:
            spectrum, norm = [], merged.delta.frobenius()
        return {
            "spectrum": spectrum,
            "update_norm": norm,
            "is_whole": isinstance(place, str),
            "is_left_out": place is None,
        }

    def finish(
        self, records: Sequence[Mapping[str, Any]], digests: Mapping[str, Sequence[str]]
    ) -> Finished:
        """Return an empty result."""
        return Finished("")

    def close(self, *, flush: bool) -> None:
        """Do nothing: there are no files."""
