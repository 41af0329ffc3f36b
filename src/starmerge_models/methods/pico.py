"""Pico: scale down the output directions that adapters share, before a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods.memory import (
    DeltaShape,
    TensorShape,
    dense_shape,
    products_bytes,
    scaled_shape,
)
from starmerge_models.methods.method import Deltas, PostStep, TensorContext, Transform, method
from starmerge_models.methods.own_response import OwnResponse
from starmerge_models.methods.scale import Scale
from starmerge_models.spectral import Truncation, on_best_device
from starmerge_models.spectral.core_space import FLOAT32_NOISE


@dataclass(frozen=True, eq=False)
class _Calibration:
    """S = (I + c B Bᵀ)⁻¹, from a Cholesky factor of the smaller of I + c B Bᵀ and I + c BᵀB."""

    c: float
    cholesky: Tensor
    """(m, m) or (R, R) float64, lower triangle."""
    B: Tensor | None
    """(m, R) float64 if the factor is that of I + c BᵀB; else None."""

    def to(self, device: torch.device) -> _Calibration:
        """Return a copy on a device."""
        B = None if self.B is None else self.B.to(device)
        return _Calibration(self.c, self.cholesky.to(device), B)

    def __call__(self, X: Tensor) -> Tensor:
        """Return S · X for X (m, k), float64."""
        if self.B is None:
            return torch.cholesky_solve(X, self.cholesky)
        return X - self.c * self.B @ torch.cholesky_solve(self.B.T @ X, self.cholesky)


@method("pico")
class Pico(Transform):
    """Scale down the output directions that the tasks share, before a merge and ``mean_norm``.

    τ_t = B_t A_t; [B_1 … B_T] = U Σ Vᵀ, and direction u_j has the share s_j = σ_j²/Σσ² of all
    outputs. The calibrated task vector is τ̃_t = S τ_t with S = I + U diag(α_j − 1) Uᵀ and
    α_j = 1/(1 + (T − 1) s_j): a direction of share 1 is divided by T, a direction of share 0 is
    unchanged. T is the number of tasks that change the tensor; for T = 1 the task vector is
    unchanged. In the paper the merged update is then scaled to the mean norm of the τ_t, so the
    method as published is ``pico+task_arithmetic+mean_norm``, ``pico+ties+mean_norm`` or
    ``pico+tsv_m+mean_norm``.

    B_t is the B of the adapter times its scale alpha/r, or the B that an earlier transform of the
    chain returned. A full fine-tune has B_t = τ_t and A_t = I. Vectors and embeddings are
    unchanged: the rows of an embedding are tokens, not outputs.

    Source: arXiv 2604.16826; the formulas are those of the defining repository
    github.com/yixuantt/Pico. Computed without an SVD, as S = (I + (T − 1) B Bᵀ/‖B‖²)⁻¹.
    Differences: full fine-tunes are supported, and T is counted for each tensor, where the
    repository skips layers that an adapter lacks. Its command line restores the norm of each
    adapter instead of the norm of the merge.
    Cost: O((m + n)R²) for adapters of R = Σr; for full fine-tunes a Cholesky factor of m × m. The
    task vectors of a tensor are read twice.
    When to use: adapters whose merge is dominated by a few common directions.
    """

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        if len(tensor.shape) < 2 or tensor.is_embedding:
            return 0
        m, R = tensor.matrix[0], tensor.total_rank
        # All B concatenated, and a copy while they are concatenated or scaled; the matrix I + c G,
        # its Cholesky factor, and LAPACK's copy.
        factor = 8 * 3 * min(R, m) ** 2 if not tensor.has_dense else 8 * 3 * m * m
        sides = 8 * 4 * R * m
        # For a dense task vector: its float64 copy, the product, and two triangular solves.
        changed = 8 * 4 * tensor.size + tensor.difference_nbytes if tensor.has_dense else 0
        return tensor.deltas_nbytes + factor + sides + changed

    def prepared_bytes(self, tensor: TensorShape) -> int:
        """Return the bytes of S; see :meth:`Transform.prepared_bytes`."""
        m, R = tensor.matrix[0], tensor.total_rank
        if len(tensor.shape) < 2 or tensor.is_embedding:
            return 0
        return 8 * m * m if tensor.has_dense or m <= R else 8 * R * (R + m)

    def result(self, delta: DeltaShape, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Transform.result`."""
        if len(tensor.shape) < 2 or tensor.is_embedding:
            return delta
        if delta.rank is None:
            return dense_shape(tensor)
        return DeltaShape(delta.rank, max(delta.nbytes, tensor.factors(delta.rank, 4)))

    def prepare_tensor(
        self, deltas: Deltas, tensor: TensorContext, survey: Any
    ) -> _Calibration | None:
        """Compute S for one tensor, None for the identity; see :meth:`Transform.prepare_tensor`."""
        if len(tensor.shape) < 2 or tensor.is_embedding:
            return None
        held = [tau_t for tau_t in deltas if not tau_t.is_zero()]
        if len(held) < 2:
            return None
        return on_best_device(held, lambda device: _calibration(held, device))

    def apply(
        self, delta: Delta, task: int, tensor: TensorContext, survey: _Calibration | None
    ) -> tuple[Delta, Truncation | None]:
        """Calibrate one delta; see :meth:`Transform.apply`."""
        if survey is None:
            return delta, None
        calibration = survey

        def calibrated(device: torch.device) -> Delta:
            S = calibration.to(device)
            if isinstance(delta, LowRank):
                B = S(delta.B.to(device).double())
                return LowRank(B.float().to(delta.device), delta.A, delta.scale)
            return Dense(S(delta.matrix.to(device).double()).float().to(delta.device))

        return on_best_device([delta], calibrated), None


def _calibration(held: Sequence[Delta], device: torch.device) -> _Calibration:
    """Compute S from the nonzero task vectors, on their device."""
    T, m = len(held), held[0].shape[0]
    if all(isinstance(tau_t, LowRank) for tau_t in held):
        B = torch.cat([_output_factor(tau_t).to(device).double() for tau_t in held], dim=1)
        c = (T - 1) / float(B.square().sum())
        if B.shape[1] < m:
            return _Calibration(c, _cholesky(B.T @ B, c), B).to(held[0].device)
        return _Calibration(c, _cholesky(B @ B.T, c), None).to(held[0].device)
    G = torch.zeros(m, m, dtype=torch.float64, device=device)
    for tau_t in held:
        B_t = _output_factor(tau_t).to(device).double()
        G.addmm_(B_t, B_t.T)
    c = (T - 1) / float(G.trace())
    return _Calibration(c, _cholesky(G, c), None).to(held[0].device)


def _output_factor(delta: Delta) -> Tensor:
    """Return B (m, r) of an adapter with its scale, or the matrix (m, n) of a full fine-tune."""
    return delta.B.double() * delta.scale if isinstance(delta, LowRank) else delta.matrix


def _cholesky(G: Tensor, c: float) -> Tensor:
    """Return the Cholesky factor of I + c·G, whose eigenvalues are in 1 … T; G is overwritten."""
    G.mul_(c).diagonal().add_(1.0)
    factor: Tensor = torch.linalg.cholesky(G)
    return factor


@method("mean_norm")
class MeanNorm(PostStep):
    """Scale the update of each tensor to the mean norm of its task vectors.

    M becomes γ M with γ = mean_t ‖τ_t‖/‖M‖, with the Frobenius norms of the models' task vectors
    before any transform. The mean is weighted by |w_t| and taken over the tasks whose task vector
    is not zero. A merge that is only rounding, ‖M‖ ≤ 1e-6 Σ |w_t| ‖τ_t‖, is unchanged.

    Source: arXiv 2604.16826, the last step of Pico.
    Cost: the norms, in factor space for adapters.
    When to use: after ``pico``; after any merge whose scale is arbitrary. Refused after ``scale``
    and ``own_response``, whose factors it would cancel.
    """

    def check_before(self, steps: Sequence[PostStep]) -> None:
        """Refuse factors that this step would cancel; see :meth:`PostStep.check_before`."""
        for step in steps:
            if isinstance(step, Scale | OwnResponse):
                raise UsageError(
                    f"mean_norm: it finds the factor of each tensor by itself, so {step.name} "
                    f"before it serves nothing. Leave {step.name} out, or put it after mean_norm."
                )

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        return scaled_shape(tensor).nbytes + products_bytes(tensor)

    def apply(self, merged: Delta, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Scale one tensor; see :meth:`PostStep.apply`."""
        whole = weight = 0.0
        for t, tau_t in deltas.items():
            norm, w_t = tau_t.frobenius(), abs(tensor.weights[t])
            whole += w_t * norm
            weight += w_t if norm > 0 else 0.0
        norm = merged.frobenius()
        if norm <= FLOAT32_NOISE * whole:
            return merged
        return merged.scaled(whole / weight / norm)
