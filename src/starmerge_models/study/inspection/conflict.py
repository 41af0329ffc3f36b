"""Conflicts between the task vectors of one tensor.

Let τ_i = U_i diag(σ) V_iᵀ. The inputs of the tasks are not available, so their second moments are
estimated from the updates, as in ``covariance`` and ``shares``: C_j = τ_jᵀτ_j/‖τ_j‖² for task j.
Its eigenvectors are task j's right singular vectors, its eigenvalues their shares of the energy. So
no rank has to be chosen, and small directions that are rounding errors have no weight. With K =
U_iᵀU_j and L = V_iᵀV_j all measures are sums over entries of small matrices:

- ⟨τ_i, τ_j⟩ = Σ_kl σ_k s_l K_kl L_kl, where s are the singular values of τ_j;
- the **response** of task i to the inputs of task j, ‖τ_i C_j^½‖² = Σ_kl σ_k² s_l² L_kl²/‖τ_j‖²;
- its part **along** task j's own response, ⟨τ_i C_j, τ_j⟩ = Σ_kl σ_k s_l³ K_kl L_kl/‖τ_j‖²;
- the **overlap** of the inputs, tr(C_i C_j)/(‖C_i‖‖C_j‖), and of the outputs, the same with
  τ_jτ_jᵀ. It is 1 for the same directions in the same proportions; its mean over random rotations
  in n dimensions is √(d_i d_j)/n, where d = (Σσ²)²/Σσ⁴;
- the share of task i's energy that is **acting** on task j's leading inputs, ‖τ_i P_j‖²/‖τ_i‖²,
  where P_j projects on the right singular vectors that STAR keeps of task j.

**The paper's bound** (arXiv 2502.10339) is on the response of a task vector B of rank r_B to an
input x of unit length in the span of the r_A right singular vectors of A: ‖Bx‖ ≤ r_B β √r_A. Here β
= max_kl σ_k(B) |v_k(B)ᵀ v_l(A)|: with x = Σ_l α_l v_l(A), each of the r_B terms σ_k v_k(B)ᵀx is at
most β Σ|α_l| ≤ β √r_A. For comparison, the largest ‖Bx‖ is the **reach** ‖diag(σ) L‖₂, and the root
mean square of ‖Bx‖ over all such x is ‖diag(σ) L‖_F/√r_A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from starmerge_models.deltas import Delta, LowRank
from starmerge_models.study.inspection.spectrum import Spectrum

Matrix: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Conflict:
    """The measures of one tensor, each (T, T) by the tasks' indices i and j; NaN if undefined.

    For vectors, and embeddings of full fine-tunes, only ``inner`` is defined.
    """

    inner: Matrix
    """⟨τ_i, τ_j⟩."""
    response: Matrix
    """‖τ_i C_j^½‖²; the diagonal has the tasks' responses to their own inputs."""
    along: Matrix
    """⟨τ_i C_j, τ_j⟩; the diagonal equals that of ``response``."""
    overlap_in: Matrix
    """Overlap of the inputs, 0 to 1."""
    overlap_out: Matrix
    """Overlap of the outputs, 0 to 1."""
    chance_in: Matrix
    """Expected overlap of random directions."""
    chance_out: Matrix
    acting: Matrix
    """‖τ_i P_j‖², an energy."""
    bound: Matrix
    """r_B β √r_A for B = τ_i and A = τ_j, each truncated to the rank that STAR keeps."""
    reach: Matrix
    """The largest ‖Bx‖ for the same B and A."""
    rms: Matrix
    """The root mean square of ‖Bx‖ for the same B and A."""
    bound_whole: Matrix
    """The bound without truncation, for all triplets in use."""
    reach_whole: Matrix
    """The largest ‖Bx‖ without truncation."""


def conflict_of(deltas: Sequence[Delta], spectra: Sequence[Spectrum | None]) -> Conflict:
    """Compare the task vectors of one tensor with each other.

    Cost: O((m + n)R²) for R triplets of all tasks together, in float64.

    Args:
        deltas: τ of each task.
        spectra: Their spectra; None for a delta without one.
    """
    T = len(deltas)
    found = {field.name: np.full((T, T), np.nan) for field in fields(Conflict)}
    # Tasks whose task vector is zero have no directions to compare.
    places = [t for t, own in enumerate(spectra) if own is not None and own.rank]
    own = [spectrum for t in places if (spectrum := spectra[t]) is not None]
    compared = _compared(own) if own else {}
    for name, values in compared.items():
        found[name][np.ix_(places, places)] = values
    exact = {t for t in places if isinstance(deltas[t], LowRank)}
    for i in range(T):
        for j in range(i + 1):
            if not {i, j} <= exact:
                found["inner"][i, j] = found["inner"][j, i] = (
                    deltas[i].frobenius() ** 2 if i == j else deltas[i].inner(deltas[j])
                )
    return Conflict(**found)


def conflict_bytes(shape: tuple[int, int], ranks: Sequence[int]) -> int:
    """Return the bytes for comparing triplets: all of them in one matrix, and products.

    Args:
        shape: (m, n) of the tensor.
        ranks: Triplets of each task.
    """
    R = sum(ranks)
    return 8 * (2 * R * sum(shape) + 10 * R * R)


def _compared(spectra: Sequence[Spectrum]) -> Mapping[str, Matrix]:
    """Return the measures that follow from the triplets, by name; each task has at least one."""
    counts = [len(own.svd.S) for own in spectra]
    U = torch.cat([own.svd.U for own in spectra], dim=1)
    V = torch.cat([own.svd.V for own in spectra], dim=1)
    S = torch.cat([own.svd.S for own in spectra])
    kept = torch.cat([(torch.arange(len(own.svd.S)) < own.kept).double() for own in spectra])
    K, L = U.T @ U, V.T @ V
    starts = np.cumsum([0, *counts[:-1]])
    energies = np.array([float(own.svd.S.square().sum()) for own in spectra])

    def sums(entries: Tensor) -> Matrix:
        by_rows = np.add.reduceat(entries.numpy(), starts, axis=0)
        return np.add.reduceat(by_rows, starts, axis=1)

    squares, products = L.square(), K * L
    inputs = sums(S.square()[:, None] * squares * S.square())
    outputs = sums(S.square()[:, None] * K.square() * S.square())
    spread = np.array([own.participation for own in spectra])
    chance = np.sqrt(np.outer(spread, spread))
    acting = sums(S.square()[:, None] * squares * kept)
    truncated = sums((S * kept).square()[:, None] * squares * kept)
    few = [max(1, own.kept) for own in spectra]
    bound, reach = _bound(S * kept, L * kept, starts, few)
    bound_whole, reach_whole = _bound(S, L, starts, counts)
    return {
        "inner": sums(S[:, None] * products * S),
        "response": inputs / energies,
        "along": sums(S[:, None] * products * S**3) / energies,
        "overlap_in": _cosines(inputs),
        "overlap_out": _cosines(outputs),
        "chance_in": np.minimum(1.0, chance / len(V)),
        "chance_out": np.minimum(1.0, chance / len(U)),
        "acting": acting,
        "bound": bound,
        "reach": reach,
        "rms": np.sqrt(truncated / np.array(few)),
        "bound_whole": bound_whole,
        "reach_whole": reach_whole,
    }


def _bound(
    S: Tensor, L: Tensor, starts: npt.NDArray[np.int64], ranks: Sequence[int]
) -> tuple[Matrix, Matrix]:
    """Return r_B β √r_A and the largest ‖Bx‖, each (T, T) by B and A.

    Args:
        S: (R,) singular values of all tasks, zero for those that B does not keep.
        L: (R, R) inner products of right singular vectors, zero columns for those that A does not
            keep.
        starts: Index of the first triplet of each task; the kept triplets come first.
        ranks: Number of kept triplets of each task.
    """
    weighed = S[:, None] * L
    magnitudes = np.maximum.reduceat(weighed.abs().numpy(), starts, axis=0)
    beta = np.maximum.reduceat(magnitudes, starts, axis=1)
    r = np.array(ranks, dtype=np.float64)
    T = len(ranks)
    most = max(ranks)
    # Blocks of one size, zero-padded, so that one call of LAPACK decomposes a row of them.
    blocks = torch.zeros(T, most, most, dtype=torch.float64)
    reach = np.empty((T, T))
    for i, start in enumerate(starts.tolist()):
        blocks.zero_()
        rows = weighed[start : start + ranks[i]]
        for j, other in enumerate(starts.tolist()):
            blocks[j, : ranks[i], : ranks[j]] = rows[:, other : other + ranks[j]]
        reach[i] = torch.linalg.matrix_norm(blocks, 2).numpy()
    return r[:, None] * beta * np.sqrt(r), reach


def _cosines(products: Matrix) -> Matrix:
    lengths = np.sqrt(np.diag(products))
    cosines: Matrix = np.clip(products / np.outer(lengths, lengths), 0.0, 1.0)
    return cosines
