"""SVC: calibration of the singular values of a merged update."""

from __future__ import annotations

from collections.abc import Sequence
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
from starmerge_models.methods.subspace_boosting import SubspaceBoosting
from starmerge_models.spectral import core_space, on_best_device, svd_matrix
from starmerge_models.spectral.core_space import FLOAT32_NOISE
from starmerge_models.spectral.dense import svd_bytes


@method("svc")
class Svc(PostStep):
    """Lower the singular values of directions in which the updates of several tasks add up.

    M = U Σ Vᵀ is the merged update; along its r-th left singular vector, s_r^t =
    ⟨u_rᵀM, u_rᵀτ_t⟩/‖u_rᵀτ_t‖² is the share of task t's own response that M has. Then σ_r becomes
    γ_r σ_r with γ_r = T/Σ_t max(α, s_r^t). A task without a response along u_r has s_r^t = 0. u_r
    is accurate to float32, so responses up to 1e-6 ‖τ_t‖ count as zero.

    With α = 1 singular values never grow, which is always safe; the paper uses α = 1/T. Vectors,
    and embeddings of full fine-tunes, are unchanged.

    Source: arXiv 2602.05536, Algorithm 1; defining repository github.com/lyymuwu/SVC.
    Cost: one SVD per tensor, in Core Space where the merge and all task vectors are low-rank.
    When to use: after sums such as ``task_arithmetic``. Refused after ``iso_c``, ``iso_cts`` and
    ``subspace_boosting``: directions of equal singular values are arbitrary.
    """

    alpha: Annotated[
        float | None, Field(gt=0, description="α, lower bound of a task's response; by default 1/T")
    ] = None

    def check_merge(self, merge: Merge) -> None:
        """Refuse merges with a flat spectrum; see :meth:`PostStep.check_merge`."""
        if isinstance(merge, IsoC | IsoCts):
            raise UsageError(
                f"svc: all singular values of what {merge.name} makes are equal, so the directions "
                "that svc would calibrate are any. Leave svc out; own_response finds one factor."
            )

    def check_before(self, steps: Sequence[PostStep]) -> None:
        """Refuse an update with equal singular values; see :meth:`PostStep.check_before`."""
        if any(isinstance(step, SubspaceBoosting) for step in steps):
            raise UsageError(
                "svc: subspace_boosting made small singular values equal, so the directions that "
                "svc would calibrate are any. Put svc before it, or leave one out."
            )

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        seen = self._with_update(tensor)
        if will_average(seen, embeddings="average"):
            return tensor.deltas_nbytes
        space = seen.core().as_matrices()
        # The SVD of the update, the responses of a task, the vectors times the new values.
        work = svd_bytes(space.p, space.q) + space.vectors + space.size
        return tensor.deltas_nbytes + max(
            space.construction_bytes, space.nbytes + work + space.result_peak_bytes
        )

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`PostStep.result`."""
        seen = self._with_update(tensor)
        if will_average(seen, embeddings="average"):
            return scaled_shape(tensor)
        space = seen.core()
        return DeltaShape(space.rank, space.result)

    def apply(self, merged: Delta, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Calibrate one tensor; see :meth:`PostStep.apply`."""
        held = list(deltas)
        if is_averaged([merged, *held], tensor, embeddings="average"):
            return merged
        T = len(tensor.tasks)
        alpha = self.alpha or 1 / T

        def calibrated(device: torch.device) -> Delta:
            space = core_space([merged, *held], device).as_matrices()
            M, *tau = space.matrices
            svd = svd_matrix(M, space.noise * float(torch.linalg.vector_norm(M)))
            total = torch.full_like(svd.S, (T - len(tau)) * alpha)
            for tau_t in tau:
                response = svd.U.T @ tau_t
                energy = response.square().sum(1)
                silent = energy <= (FLOAT32_NOISE * torch.linalg.vector_norm(tau_t)) ** 2
                s = (svd.S[:, None] * svd.V.T * response).sum(1) / torch.where(silent, 1.0, energy)
                total += torch.where(silent, 0.0, s).clamp(min=alpha)
            return space.delta((svd.U * (svd.S * T / total)) @ svd.V.T)

        return on_best_device([merged, *held], calibrated)

    def _with_update(self, tensor: TensorShape) -> TensorShape:
        """Return the shapes of a tensor whose deltas are the update and the task vectors."""
        return replace(tensor, deltas=(scaled_shape(tensor), *tensor.deltas))
