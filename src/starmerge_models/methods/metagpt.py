"""MetaGPT: task arithmetic with coefficients from the task vectors' norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from starmerge_models.deltas import Delta, total
from starmerge_models.methods.memory import TensorShape, inner_bytes, total_bytes
from starmerge_models.methods.method import Deltas, Merge, TensorContext, Walk, method


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of all tasks."""

    lambdas: list[float]
    """λ_t, which sum to 1; all 0 if all task vectors are zero."""


@method("metagpt")
class MetaGpt(Merge):
    """Weight each task vector by its share of the squared norms.

    The update is Σ λ_t τ_t with λ_t = ‖τ_t‖²/Σ_k ‖τ_k‖², norms over the whole model.

    Source: arXiv 2406.11385, its closed form for λ_t. A weight w_t counts in both places: it
    multiplies τ_t first.
    Cost: the norms, in factor space for adapters, and one addition per tensor and task.
    When to use: task vectors of different sizes, and no data to tune coefficients on.
    """

    @property
    def passes(self) -> int:
        """See :attr:`Method.passes`."""
        return 1

    def survey(self, walk: Walk) -> Coefficients:
        """Compute the norms over the whole model; see :meth:`Merge.survey`."""

        def energies(deltas: Deltas, tensor: TensorContext) -> torch.Tensor:
            found = torch.zeros(len(tensor.tasks), dtype=torch.float64)
            for t, tau_t in deltas.items():
                found[t] = tau_t.frobenius() ** 2
            return found

        energy = sum(walk(energies), torch.zeros(1, dtype=torch.float64))
        whole = float(energy.sum())
        return Coefficients((energy / whole).tolist() if whole else energy.tolist())

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        # A task vector is scaled before it is added; the survey computed the norms before.
        norms = (inner_bytes(tensor, [delta]) for delta in tensor.deltas)
        return max(tensor.largest_delta_nbytes + total_bytes(tensor), *norms)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Coefficients) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        return total(tau_t.scaled(survey.lambdas[t]) for t, tau_t in deltas.items())
