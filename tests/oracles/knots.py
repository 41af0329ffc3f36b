"""KnOTS (arXiv 2410.19735): TIES in the joint left basis of all tasks.

[delta_1 ... delta_T] = U diag(sigma) [V_1 ... V_T], V_t of shape (rank, n). TIES merges the
diag(sigma) V_t as the defining repository does ("sv"), or the V_t ("v").

A zero sum of the trimmed entries gives zero: the majority sign of TIES is no property of the
deltas here, since the sign of a row of V is the SVD's choice.
"""

import numpy as np

from tests.oracles.tsv_m import scale, triplets_of


def joint(deltas, on):
    """U, and the coordinates of each task: V_t with on="v" (U takes sigma), else sigma V_t."""
    U, sigma, _ = triplets_of(np.hstack(deltas), scale(deltas))
    # diag(sigma) V_t = U^T delta_t: so a zero delta has zeros, not the SVD's rounding.
    rotated = [U.T @ delta for delta in deltas]
    if on == "v":
        return U * sigma, [V / sigma[:, None] for V in rotated]
    return U, rotated


def threshold(values, k):
    """The ceil(k% * count)-th largest magnitude."""
    magnitudes = np.sort(np.abs(values))[::-1]
    if len(magnitudes) == 0:
        return 0.0
    return magnitudes[int(np.ceil(k * len(magnitudes) / 100.0)) - 1]


def trimmed(coordinates, limits):
    """Each task's coordinates without the entries below its threshold."""
    return [
        np.where(np.abs(V) >= limit, V, 0.0) for V, limit in zip(coordinates, limits, strict=True)
    ]


def disjoint_mean(coordinates, weights):
    """Mean, over the tasks whose entry has the sign of the entries' sum, of these entries.

    The coordinates are those of the weighted deltas: the sum is divided by sum(|w_t|).
    """
    elected = np.sign(sum(coordinates))
    total = np.zeros_like(coordinates[0])
    members = np.zeros_like(coordinates[0])
    for V, weight in zip(coordinates, weights, strict=True):
        agrees = (np.sign(V) == elected) & (elected != 0.0)
        total += np.where(agrees, V, 0.0)
        members += np.where(agrees, abs(weight), 0.0)
    return np.divide(total, members, out=np.zeros_like(total), where=members > 0.0)


def knots(deltas, k=20.0, lam=1.0, on="sv", weights=None):
    """lam * U diag(sigma) V_merged for one tensor, trimmed within it."""
    return knots_of_model([deltas], k, lam, on, weights, trim="local")[0]


def knots_of_model(tensors, k=20.0, lam=1.0, on="sv", weights=None, trim="global"):
    """The merged matrix of every tensor; `tensors` holds the task list of each.

    With trim="global" a task has one threshold, over its coordinates in all tensors.
    """
    tasks = len(tensors[0])
    weights = [1.0] * tasks if weights is None else weights
    joints = []
    for deltas in tensors:
        weighted = [w * delta for w, delta in zip(weights, deltas, strict=True)]
        joints.append(joint(weighted, on))
    whole = [np.concatenate([V[t].ravel() for _, V in joints]) for t in range(tasks)]
    merged = []
    for U, V in joints:
        values = whole if trim == "global" else [coordinates.ravel() for coordinates in V]
        limits = [threshold(of_task, k) for of_task in values]
        merged.append(lam * U @ disjoint_mean(trimmed(V, limits), weights))
    return merged
