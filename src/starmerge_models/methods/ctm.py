"""CtM: compress the task vectors into common subspaces of r dimensions, then merge."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.methods.iso import sum_of
from starmerge_models.methods.kinds.spectral import SpectralMerge
from starmerge_models.methods.method import TensorContext, method
from starmerge_models.methods.ties import elected_mean
from starmerge_models.methods.trim import Percent, largest_entries
from starmerge_models.selection import share_of
from starmerge_models.spectral import CoreSpace, svd_matrix
from starmerge_models.spectral.core_space import CoreShape
from starmerge_models.spectral.dense import svd_bytes

_MOST_ITERATIONS = 1000
_TOLERANCE = 1e-6
"""The iteration ends when the relative error of the approximation changes by less than this."""


@method("ctm")
class Ctm(SpectralMerge):
    """Find r-dimensional bases common to all tasks, and merge the tasks' r × r coordinates.

    U (m, r) and V (n, r) are orthonormal and minimise Σ_t ‖X_t − U Uᵀ X_t V Vᵀ‖² for
    X_t = λ_t τ_t/‖τ_t‖ with λ_t = β ‖τ_t‖ + (1 − β) mean_s ‖τ_s‖: with β = 1 large task vectors
    dominate, with β = 0 all have the same weight. This is a Tucker-2 decomposition, computed by
    HOOI from HOSVD. The coordinates O_t = Uᵀ τ_t V of the task vectors are merged by ``rule``: by
    TIES (the k % largest entries of each are kept, signs are elected, and the entries that agree
    are averaged), or by their sum or mean. The update is λ U Ō Vᵀ. It has rank r by construction,
    so it is stored as an adapter without a truncation.

    Where entries cancel exactly, Ō is zero: the signs of singular vectors are arbitrary, so a
    majority of signs has no meaning.

    Source: arXiv 2606.03723 (Compress then Merge); the formulas, the iteration and its tolerance
    1e-6 are those of the defining repository github.com/ZhengbaoHe/compress-then-merge. β = 0.25 is
    that of its published command; values from 0 to 0.75 are reported as equally good. The
    repository tunes k and λ on validation data; the defaults here are those of TIES.
    Differences: the threshold keeps ⌈k %⌉ entries, not one more; the default rank is the largest
    rank of the tensor's task vectors; adapters may have different ranks; full fine-tunes are
    supported, and compressed only if a rank is given.
    Cost: one SVD per task, and two in each of three or more iterations, in Core Space for adapters.
    For full fine-tunes with a rank, one SVD of all task vectors concatenated, and small ones;
    without a rank, several SVDs of that size.
    When to use: adapters, where the result must have a low rank.
    """

    rank: Annotated[
        int | None,
        Field(ge=1, description="rank r of the update; by default the largest rank of the tasks"),
    ] = None
    beta: Annotated[
        float, Field(ge=0, le=1, description="how much the norms of task vectors weight the bases")
    ] = 0.25
    rule: Annotated[
        Literal["ties", "sum", "mean"], Field(description="how the coordinates are merged")
    ] = "ties"
    k: Percent = 20.0
    lambda_: Annotated[float, Field(description="factor of the merged update")] = 1.0

    def matrix_memory(self, space: CoreShape) -> int:
        """Return the peak memory in bytes; see :meth:`SpectralMerge.matrix_memory`."""
        # Scaled matrices, their concatenation, LAPACK's copy of it, and products with the bases;
        # the SVD of a matrix with no more columns than rows; r × r coordinates, stacked, and six
        # temporaries for the election.
        side = max(space.p, space.q)
        r = min(self.rank or max(space.ranks), side)
        coordinates = 8 * (2 * space.count + 6) * r * r
        return 4 * space.count * space.size + svd_bytes(side, side) + coordinates

    def merge_matrices(
        self, tau: list[Tensor], weights: list[float], space: CoreSpace, tensor: TensorContext
    ) -> tuple[Tensor, Tensor]:
        """Merge one tensor; see :meth:`SpectralMerge.merge_matrices`."""
        r = self.rank or max(len(svd_matrix(tau_t, space.floor).S) for tau_t in tau)
        U, V = self._bases(tau, r, space.noise)
        coordinates = [U.T @ tau_t @ V for tau_t in tau]
        if self.rule == "ties":
            count = share_of(coordinates[0].numel(), self.k)
            kept = [largest_entries(O_t, count, space.noise) for O_t in coordinates]
            merged = elected_mean(torch.stack(kept), weights, majority=0.0)
        else:
            merged = sum_of(coordinates) / (tensor.total_weight if self.rule == "mean" else 1.0)
        return U, self.lambda_ * V @ merged.T

    def _bases(self, tau: list[Tensor], r: int, noise: float) -> tuple[Tensor, Tensor]:
        """Return U (p, r) and V (q, r), with fewer columns if the task vectors have lower rank."""
        norms = [float(torch.linalg.vector_norm(tau_t)) for tau_t in tau]
        mean = math.fsum(norms) / len(norms)
        lambdas = [self.beta * norm + (1 - self.beta) * mean for norm in norms]
        X = [tau_t * (lam / norm) for tau_t, lam, norm in zip(tau, lambdas, norms, strict=True)]
        floor, energy = noise * math.fsum(lambdas), math.fsum(lam**2 for lam in lambdas)
        V = _leading([X_t.T for X_t in X], r, floor)
        errors: list[float] = []
        for _ in range(_MOST_ITERATIONS):
            U = _leading([X_t @ V for X_t in X], r, floor)
            V = _leading([X_t.T @ U for X_t in X], r, floor)
            kept = math.fsum(float((U.T @ X_t @ V).square().sum()) for X_t in X)
            errors.append(math.sqrt(abs(1 - kept / energy)))
            if len(errors) > 2 and abs(errors[-2] - errors[-1]) < _TOLERANCE:
                break
        return U, V


def _leading(blocks: list[Tensor], r: int, floor: float) -> Tensor:
    """Return the first r left singular vectors of the concatenation of (p, ·) matrices, float64."""
    X = torch.cat(blocks, dim=1)
    if X.shape[1] > X.shape[0]:
        # X = Rᵀ Qᵀ has the left singular vectors of Rᵀ.
        X = torch.linalg.qr(X.T, mode="r").R.T
    return svd_matrix(X, floor).first(r).U
