"""KnOTS: align the task vectors by a joint SVD, then merge them with TIES."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank, total
from starmerge_models.methods.kinds.spectral import is_averaged, will_average
from starmerge_models.methods.memory import DeltaShape, TensorShape, total_bytes, total_shape
from starmerge_models.methods.method import Deltas, Merge, TensorContext, Walk, method
from starmerge_models.methods.ties import elected_mean
from starmerge_models.methods.trim import PASSES, Percent, Scope, global_thresholds, local_threshold
from starmerge_models.spectral import core_space, on_best_device, svd_matrix
from starmerge_models.spectral.dense import svd_bytes


@dataclass(frozen=True, eq=False)
class _Aligned:
    """[τ_1 … τ_T] = U Σ [V_1 … V_T], with the ρ nonzero singular values."""

    U: Tensor
    """(m, ρ) float64."""
    S: Tensor
    """(ρ,) float64."""
    V: dict[int, Dense]
    """By task, (ρ, n) float32."""


@method("knots")
class Knots(Merge):
    """Express all task vectors in one basis, and merge their coordinates with TIES.

    [τ_1 … τ_T] = U Σ [V_1 … V_T]; the update is λ U X, where X is the TIES merge of the Σ V_t: the
    k % largest entries of each are kept, signs are elected, and the entries that agree are
    averaged. ``on="v"`` merges the V_t instead and multiplies by Σ afterwards, so that directions
    of small singular values count as much as those of large ones. Where entries cancel exactly, X
    is zero: the signs of singular vectors are arbitrary, so a majority of signs has no meaning.

    Source: arXiv 2410.19735, which trims the V_t; defining repository github.com/gstoica27/KnOTS,
    which trims Σ V_t, and tunes k and λ.
    Cost: one SVD of all task vectors concatenated; in factor space for adapters, with X of rank
    ρ ≤ Σr. The Σ V_t are dense: ρ·n numbers per task. A global trim takes two more passes.
    When to use: adapters whose task vectors lie in different subspaces.
    """

    k: Percent = 20.0
    scope: Scope = "global"
    lambda_: Annotated[float, Field(description="factor of the merged update")] = 1.0
    on: Annotated[Literal["v", "sv"], Field(description="matrices to trim: V_t, or Σ V_t")] = "sv"

    averages = True

    @property
    def passes(self) -> int:
        """See :attr:`Method.passes`."""
        return PASSES if self.scope == "global" else 0

    def survey(self, walk: Walk) -> list[float] | None:
        """Compute the thresholds of the whole model; see :meth:`Merge.survey`."""
        if self.scope == "local":
            return None

        def aligned_walk(visit_tensor: Any) -> Any:
            def visit(deltas: Deltas, tensor: TensorContext) -> Any:
                held = dict(deltas.items())
                if is_averaged(list(held.values()), tensor, embeddings="average"):
                    return visit_tensor(Deltas({}), tensor)
                found = self._coordinates(self._align(held))
                return visit_tensor(Deltas.of(found), tensor)

            return walk(visit)

        return global_thresholds(aligned_walk, self.k)

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        if will_average(tensor, embeddings="average"):
            return tensor.deltas_nbytes + total_bytes(tensor)
        space = tensor.core().as_matrices()
        (m, n), rho = tensor.matrix, min(sum(space.ranks), space.p)
        # To align: all matrices concatenated, LAPACK's copy, the SVD of a matrix with no more
        # columns than rows, and float64 coordinates (ρ, n).
        svd = svd_bytes(min(space.p, space.count * space.q), space.p)
        aligning = space.nbytes + 2 * space.count * space.size + svd + 16 * rho * n
        # To elect: for each task two float32 coordinates, four float64 ones, and two masks; six
        # float64 temporaries for all tasks.
        electing = (8 + 32 + 2) * space.count * rho * n + 8 * 6 * rho * n
        basis = 8 * 2 * rho * m
        return tensor.deltas_nbytes + basis + max(space.construction_bytes, aligning, electing)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Merge.result`."""
        if will_average(tensor, embeddings="average"):
            return total_shape(tensor)
        space = tensor.core()
        rho = min(sum(space.ranks), space.p)
        return DeltaShape(rho, tensor.factors(rho, 4))

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: list[float] | None) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        held = dict(deltas.items())
        if is_averaged(list(held.values()), tensor, embeddings="average"):
            return total(held.values()).scaled(1 / tensor.total_weight)
        aligned = self._align(held)
        coordinates = self._coordinates(aligned)
        floors = [
            local_threshold(V_t, self.k) if survey is None else survey[t]
            for t, V_t in coordinates.items()
        ]
        V = torch.stack([V_t.tensor for V_t in coordinates.values()]).double()
        large = V.abs() >= V.new_tensor(floors)[:, None, None]
        w = [tensor.weights[t] for t in coordinates]
        merged = self.lambda_ * elected_mean(torch.where(large, V, 0.0), w, majority=0.0)
        S = aligned.S if self.on == "v" else torch.ones_like(aligned.S)
        return LowRank((aligned.U * S).float(), merged.float())

    def _coordinates(self, aligned: _Aligned) -> dict[int, Dense]:
        if self.on == "v":
            return aligned.V
        return {t: Dense((aligned.S[:, None] * V.tensor).float()) for t, V in aligned.V.items()}

    def _align(self, deltas: dict[int, Delta]) -> _Aligned:
        def aligned(device: torch.device) -> _Aligned:
            space = core_space(list(deltas.values()), device).as_matrices()
            X = torch.cat(space.matrices, dim=1)
            if X.shape[1] > X.shape[0]:
                # X = Rᵀ Qᵀ has the U and Σ of Rᵀ; Σ⁻¹ Uᵀ X is V.
                X = torch.linalg.qr(X.T, mode="r").R.T
            joint = svd_matrix(X, space.floor)
            V = {}
            for t, C in zip(deltas, space.matrices, strict=True):
                # V_t is Σ⁻¹ Uᵀ τ_t. Rows that are only rounding, of the arithmetic or of a dense
                # τ_t's entries, are set to zero; otherwise they would count in the election.
                rows = joint.U.T @ C
                is_rounding = torch.linalg.vector_norm(
                    rows, dim=1
                ) <= space.noise * torch.linalg.norm(C)
                V_t = torch.where(is_rounding, 0.0, 1 / joint.S)[:, None] * rows
                whole = V_t if space.V is None else V_t @ space.V.T
                V[t] = Dense(whole.float().to(space.home))
            U = joint.U if space.U is None else space.U @ joint.U
            return _Aligned(U.to(space.home), joint.S.to(space.home), V)

        return on_best_device(list(deltas.values()), aligned)
