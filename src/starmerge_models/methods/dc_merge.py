"""DC-Merge: merge balanced task vectors in orthonormal bases of the span of all tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta
from starmerge_models.methods.kinds.spectral import CoreSpaceMerge
from starmerge_models.methods.method import TensorContext, method
from starmerge_models.methods.ties import elected_mean
from starmerge_models.methods.trim import Percent, largest_entries
from starmerge_models.spectral import CoreSpace, polar
from starmerge_models.spectral.coordinates import Coordinates
from starmerge_models.spectral.core_space import CoreShape
from starmerge_models.spectral.dense import polar_bytes


@method("dc_merge")
class DcMerge(CoreSpaceMerge):
    """Balance the energy of each task's directions, and merge in a basis that covers all of them.

    The first r_t triplets of τ_t = U_t Σ_t V_tᵀ are kept, and their singular values are smoothed at
    constant sum: ``average`` makes all equal; ``linear`` replaces them by a linear decrease from
    the first to the last, of the ratio min(ρ, σ_1/σ_r); ``none`` does not change them. Ũ and Ṽ, the
    cover space, are the polar factors of [U_1 … U_T] and [V_1 … V_T]. In these bases the task
    vectors are M_t = Ũᵀ τ_t Ṽ, of which the k % largest entries are kept, at least r_t. TIES merges
    them to M̄: signs are elected, and the entries that agree are averaged. Of M̄ the diagonal blocks
    are kept, one for the r_t directions of each task: the update is α Ũ (mask ∘ M̄) Ṽᵀ.

    ``triplets="all"`` keeps all triplets of a task, as the repository does for adapters.
    ``"share"`` keeps at most ⌊min(m, n)/T⌋, as the repository does for full fine-tunes. It does not
    smooth these: use ``triplets=share smoothing=none``.

    Source: arXiv 2603.06242; the formulas and defaults are those of the defining repository
    github.com/Tobeginwith/DC-Merge. Its α is tuned on validation data, from 0.1 to 3; 1 is neutral.
    Differences: at least r_t entries of M_t are kept, where the repository keeps at least one.
    For the weights in its experiments, 8 to 20 tasks, that is the same; for two adapters of rank
    16, k = 0.1 % is one entry. Directions that no task has are dropped, where the repository
    includes arbitrary ones chosen by LAPACK.
    Cost: one SVD per task, from the factors for adapters, and two of all kept vectors, in Core
    Space for adapters.
    When to use: adapters with steep spectra, of which a sum keeps little but the first directions;
    followed by ``own_response``, which finds the factor that α should be.
    """

    alpha: Annotated[float, Field(description="factor of the merged update")] = 1.0
    smoothing: Annotated[
        Literal["average", "linear", "none"],
        Field(description="how the kept singular values of a task are balanced"),
    ] = "average"
    rho: Annotated[
        float,
        Field(ge=1, description="largest ratio of the first to the last value, for linear"),
    ] = 5.0
    k: Percent = 0.1
    triplets: Annotated[
        Literal["share", "all"] | Annotated[int, Field(ge=1)],
        Field(description="triplets kept of each task: share, all, or a number"),
    ] = "all"

    def extra_memory(self, deltas: Sequence[Delta]) -> int:
        """Return the bytes of the M_t, which are Σr × Σr; see :class:`CoreSpaceMerge`."""
        return 8 * (2 * len(deltas) + 8) * sum(delta.rank for delta in deltas) ** 2

    def matrix_memory(self, space: CoreShape) -> int:
        """Return the peak memory in bytes; see :meth:`CoreSpaceMerge.matrix_memory`."""
        # As for tsv_m; and in the cover space of c dimensions a matrix for each task, all of them
        # stacked, and eight temporaries for the election and the mean.
        c = sum(min(rank, self._kept(space.shape, space.count)) for rank in space.ranks)
        bases = 8 * 3 * c * (space.p + space.q)
        covers = 8 * (2 * space.count + 8) * c * c
        side = max(space.p, space.q)
        work = bases + space.size + max(covers, polar_bytes(side, c))
        return space.svds + max(space.svd_peak_bytes, work)

    def merge_coordinates(
        self,
        tau: list[Coordinates],
        weights: list[float],
        space: CoreSpace,
        tensor: TensorContext,
    ) -> Tensor:
        """Merge one tensor; see :meth:`CoreSpaceMerge.merge_coordinates`."""
        most, floor = self._kept(space.shape, len(tau)), space.floor
        svds = [C.svd(floor).first(most) for C in tau]
        U = polar(torch.cat([svd.U for svd in svds], dim=1), space.noise)
        V = polar(torch.cat([svd.V for svd in svds], dim=1), space.noise)
        ends = [0]
        for svd in svds:
            ends.append(ends[-1] + len(svd.S))
        count = math.floor(Fraction(str(self.k)) * ends[-1] ** 2 / 100)
        M = []
        for svd in svds:
            M_t = (U.T @ svd.U * self._smoothed(svd.S)) @ (svd.V.T @ V)
            M.append(largest_entries(M_t, max(1, count, len(svd.S)), space.noise))
        mean = elected_mean(torch.stack(M), weights, majority=0.0)
        mask = torch.zeros_like(mean)
        for start, end in pairwise(ends):
            mask[start:end, start:end] = 1.0
        return self.alpha * U @ (mask * mean) @ V.T

    def _kept(self, shape: tuple[int, int], T: int) -> int:
        """Return the largest number of triplets that each of T tasks keeps."""
        size = min(shape)
        share = {"share": max(1, size // T), "all": size}
        return int(share.get(str(self.triplets), self.triplets))

    def _smoothed(self, S: Tensor) -> Tensor:
        """Return smoothed singular values (r,) of the same sum."""
        if self.smoothing == "none" or len(S) == 0:
            return S
        linear = self.smoothing == "linear"
        ratio = min(self.rho, float(S[0] / S[-1])) if linear else 1.0
        share = torch.linspace(ratio, 1.0, len(S), dtype=S.dtype, device=S.device)
        return share * (S.sum() / share.sum())
