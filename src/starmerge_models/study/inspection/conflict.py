"""What the task vectors of one tensor do to each other.

Written τ_i = U_i diag(σ) V_iᵀ. Nobody has the inputs of the tasks, so what a task reads is taken
from its update, as ``covariance`` and ``shares`` do: C_j = τ_jᵀτ_j/‖τ_j‖² stands for the second
moments of task j's inputs. Its eigenvectors are task j's right singular vectors, its eigenvalues
their shares of the energy. So no rank has to be chosen, and what rounding leaves of small
directions counts for nothing. With K = U_iᵀU_j and L = V_iᵀV_j everything is a sum over entries of
small matrices:

- ⟨τ_i, τ_j⟩ = Σ_kl σ_k s_l K_kl L_kl, where s are the singular values of τ_j;
- the **response** of task i to the inputs of task j, ‖τ_i C_j^½‖² = Σ_kl σ_k² s_l² L_kl²/‖τ_j‖²;
- its part **along** what task j itself does there, ⟨τ_i C_j, τ_j⟩ = Σ_kl σ_k s_l³ K_kl L_kl/‖τ_j‖²;
- the **overlap** of the inputs, tr(C_i C_j)/(‖C_i‖‖C_j‖), and of the outputs, the same with
  τ_jτ_jᵀ. It is 1 for the same directions in the same proportions; the mean over random rotations
  in n dimensions is √(d_i d_j)/n, where d = (Σσ²)²/Σσ⁴;
- the share of task i's energy that is **acting** on task j's leading inputs, ‖τ_i P_j‖²/‖τ_i‖²,
  where P_j projects on the right singular vectors that STAR keeps of task j.

**The paper's bound** (arXiv 2502.10339) is on what a task vector B of rank r_B does to an input x
of unit length in the span of the r_A right singular vectors of A: ‖Bx‖ ≤ r_B β √r_A. Here
β = max_kl σ_k(B) |v_k(B)ᵀ v_l(A)|: with x = Σ_l α_l v_l(A), each of the r_B terms σ_k v_k(B)ᵀx is
at most β Σ|α_l| ≤ β √r_A. Beside it stand the largest ‖Bx‖ there is, the **reach** ‖diag(σ) L‖₂,
and its root mean square over all such x, ‖diag(σ) L‖_F/√r_A.
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
    """Of one tensor, each (T, T) by the places i and j of the tasks; NaN where not defined.

    Only what is in ``inner`` is defined for vectors, and for embeddings of full fine-tunes.
    """

    inner: Matrix
    """⟨τ_i, τ_j⟩."""
    response: Matrix
    """‖τ_i C_j^½‖²: on the diagonal, of the task to its own inputs."""
    along: Matrix
    """⟨τ_i C_j, τ_j⟩; on the diagonal the same as ``response``."""
    overlap_in: Matrix
    """Of the inputs, 0 to 1."""
    overlap_out: Matrix
    """Of the outputs, 0 to 1."""
    chance_in: Matrix
    """What random directions would overlap."""
    chance_out: Matrix
    acting: Matrix
    """‖τ_i P_j‖², an energy."""
    bound: Matrix
    """r_B β √r_A for B = τ_i and A = τ_j, each truncated to the rank that STAR keeps."""
    reach: Matrix
    """The largest ‖Bx‖ of the same."""
    rms: Matrix
    """The root mean square of ‖Bx‖ of the same."""
    bound_whole: Matrix
    """The bound without truncation, of all triplets that are looked at."""
    reach_whole: Matrix
    """The largest ‖Bx‖ of the same."""


def conflict_of(deltas: Sequence[Delta], spectra: Sequence[Spectrum | None]) -> Conflict:
    """Compare the task vectors of one tensor with each other.

    Cost: O((m + n)R²) for R triplets of all tasks together, in float64.

    Args:
        deltas: τ of each task.
        spectra: Their spectra, None where a delta has none.
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
    """Return the bytes that comparing triplets takes: all side by side, and products of them.

    Args:
        shape: (m, n) of the tensor.
        ranks: Triplets of each task.
    """
    R = sum(ranks)
    return 8 * (2 * R * sum(shape) + 10 * R * R)


def _compared(spectra: Sequence[Spectrum]) -> Mapping[str, Matrix]:
    """Return all that the triplets tell, by name; each task has one triplet at least."""
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
        S: (R,) singular values of all tasks, those that B leaves out zero.
        L: (R, R) inner products of right singular vectors, the columns that A leaves out zero.
        starts: Where the triplets of each task begin; the first of each are those it keeps.
        ranks: How many it keeps.
    """
    weighed = S[:, None] * L
    magnitudes = np.maximum.reduceat(weighed.abs().numpy(), starts, axis=0)
    beta = np.maximum.reduceat(magnitudes, starts, axis=1)
    r = np.array(ranks, dtype=np.float64)
    T = len(ranks)
    most = max(ranks)
    # Blocks of one size, filled up with zeros, which LAPACK decomposes in one call a row.
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
