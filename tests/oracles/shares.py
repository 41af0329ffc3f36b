"""Two-sided shares: each task speaks where both the inputs and the outputs are its own.

C_t = delta_t^T delta_t / |delta_t|^2 for the inputs, P_t = delta_t delta_t^T / |delta_t|^2 for the
outputs; R_t = w_t C_t S_C^-1 and L_t = w_t S_P^-1 P_t with S = sum of w_t C_t (P_t) plus a ridge;
M = sum of L_t^p delta_t R_t^p. Written with full matrices and matrix powers throughout.
"""

import numpy as np

ZERO = 1e-10


def rank(matrix):
    """Number of singular values above ZERO * |matrix|."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return int(np.sum(values > ZERO * np.linalg.norm(matrix)))


def symmetric_power(matrix, power):
    """A power of a positive semidefinite matrix; zero where it is zero."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > 1e-12 * max(values.max(), 0.0)
    return (vectors * np.where(kept, np.abs(values) ** power, 0.0)) @ vectors.T


def input_shares(deltas, weights, ridge, power):
    """R_t^p of each task, (n, n)."""
    n = deltas[0].shape[1]
    unit = [delta / np.linalg.norm(delta) for delta in deltas]
    C = [w * tau.T @ tau for w, tau in zip(weights, unit, strict=True)]
    directions = min(n, sum(map(rank, deltas)))
    S = sum(C) + ridge * np.trace(sum(C)) / directions * np.eye(n)
    inner, outer = symmetric_power(S, -0.5), symmetric_power(S, 0.5)
    return [outer @ symmetric_power(inner @ C_t @ inner, power) @ inner for C_t in C]


def shares(deltas, power=0.5, ridge=0.1, weights=None):
    """The merge before its factor."""
    m, n = deltas[0].shape
    weights = [1.0] * len(deltas) if weights is None else weights
    present = [(w, d) for w, d in zip(weights, deltas, strict=True) if w and np.any(d)]
    if not present:
        return np.zeros((m, n))
    if len(present) == 1:
        return present[0][1]
    w, taus = [w for w, _ in present], [d for _, d in present]
    R = input_shares(taus, w, ridge, power)
    L = [share.T for share in input_shares([tau.T for tau in taus], w, ridge, power)]
    return sum(L_t @ tau @ R_t for L_t, tau, R_t in zip(L, taus, R, strict=True))


def factor(models, merged, weights=None):
    """sqrt(f_1 f_2): all of the task vectors, and the best fit on the tasks' own inputs."""
    weights = [1.0] * len(models) if weights is None else weights
    energy, agreement, cross, both = 0.0, 0.0, 0.0, 0.0
    for name, M in merged.items():
        of = [
            (w, model[name])
            for w, model in zip(weights, models, strict=True)
            if w and name in model and np.any(model[name])
        ]
        whole = sum(np.sum(delta**2) for _, delta in of)
        for w, delta in of:
            inputs = delta.T @ delta / whole  # the task's part times C_t
            energy += w * np.sum(delta**2)
            agreement += w * np.sum(M * delta)
            cross += w * np.trace(M @ inputs @ delta.T)
            both += w * np.trace(M @ inputs @ M.T)
    tasks = sum(
        bool(w) and any(np.any(delta) for delta in model.values())
        for w, model in zip(weights, models, strict=True)
    )
    return float(min(tasks, np.sqrt(energy / agreement * cross / both)))
