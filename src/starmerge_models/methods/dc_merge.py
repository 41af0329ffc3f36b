"""DC-Merge: balanced task vectors, merged in orthonormal bases that cover all of them."""

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
    """Balance the energy of each task's directions, merge in a basis that covers all of them.

    Of τ_t = U_t Σ_t V_tᵀ the first r_t triplets stay, and their singular values are smoothed at
    constant sum: ``average`` makes all equal; ``linear`` lets them fall linearly from the first to
    the last, at the ratio min(ρ, σ_1/σ_r); ``none`` leaves them. Ũ and Ṽ, the cover space, are the
    polar factors of [U_1 … U_T] and [V_1 … V_T]. There the task vectors are M_t = Ũᵀ τ_t Ṽ, of
    which the k % largest entries stay, at least r_t; M̄ is what TIES makes of them: signs elected,
    the mean of the entries that agree. Its blocks on the diagonal stay, one for each task's r_t
    directions: the update is α Ũ (mask ∘ M̄) Ṽᵀ.

    ``triplets="all"`` keeps all triplets of a task, as the repository does for adapters;
    ``"share"`` at most ⌊min(m, n)/T⌋, as it does for full fine-tunes, which it does not smooth: use
    ``triplets=share smoothing=none``.

    Source: arXiv 2603.06242; defining repository github.com/Tobeginwith/DC-Merge, from which the
    formulas and the defaults are. Its α is tuned on validation data, from 0.1 to 3; 1 is neutral.
    Different from there: at least r_t entries of M_t stay where the repository keeps at least one.
    For the weights in its experiments, 8 to 20 tasks, that is the same; of two adapters of rank 16,
    k = 0.1 % is one entry. Directions that no task has are left out, where LAPACK's choice of them
    came in.
    Cost: an SVD a task and two of all kept vectors; for adapters in Core Space, the former from
    their factors.
    When to use: adapters with steep spectra, of which a sum keeps little but the first directions;
    with ``own_response`` after it, which finds the factor that α should be.
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
        """Tell the bytes needed; see :meth:`CoreSpaceMerge.matrix_memory`."""
        # As for tsv_m; and in the cover space of c dimensions a matrix for each task, all of them
        # stacked, and eight to elect signs and take the mean in.
        c = sum(min(rank, self._kept(space.shape, space.count)) for rank in space.ranks)
        bases = 8 * 3 * c * (space.p + space.q)
        covers = 8 * (2 * space.count + 8) * c * c
        side = max(space.p, space.q)
        work = bases + space.size + max(covers, polar_bytes(side, c))
        return space.svds + max(space.svd_making, work)

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
        """Return singular values (r,) of the same sum, balanced."""
        if self.smoothing == "none" or len(S) == 0:
            return S
        linear = self.smoothing == "linear"
        ratio = min(self.rho, float(S[0] / S[-1])) if linear else 1.0
        share = torch.linspace(ratio, 1.0, len(S), dtype=S.dtype, device=S.device)
        return share * (S.sum() / share.sum())
