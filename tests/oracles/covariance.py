"""Covariance merging: RegMean (arXiv 2212.09849) with the deltas' own covariances.

M minimises sum w_t |(M - delta_t) C_t^(1/2)|^2 with C_t = delta_t^T delta_t / |delta_t|^2 for the
input side; the output side is the same for the transposed deltas.
"""

import numpy as np


def covariance_of(delta):
    """C = delta^T delta / |delta|^2, of trace one; zero for a zero delta."""
    length = np.linalg.norm(delta)
    if length == 0.0:
        return np.zeros((delta.shape[1], delta.shape[1]))
    unit = delta / length
    return unit.T @ unit


def overlap(deltas):
    """Mean cosine of the C_t over the pairs of tasks that are not zero; None without a pair."""
    C = [covariance_of(delta) for delta in deltas if np.any(delta)]
    cosines = [
        float(np.sum(C[s] * C[t]) / (np.linalg.norm(C[s]) * np.linalg.norm(C[t])))
        for s in range(len(C))
        for t in range(s + 1, len(C))
    ]
    return float(np.mean(cosines)) if cosines else None


def chosen_side(deltas):
    """The side on which the tasks overlap more: input when even, or without a pair."""
    inner, outer = overlap(deltas), overlap([delta.T for delta in deltas])
    return "input" if inner is None or inner >= outer else "output"


def covariance(deltas, side="auto", ridge=0.1, weights=None):
    """(sum w delta C)(sum w C + ridge * mean eigenvalue * I)^-1; pseudo-inverse without a ridge.

    The mean eigenvalue is the trace of sum w C over the true number of columns.
    """
    weights = [1.0] * len(deltas) if weights is None else weights
    if side == "auto":
        side = chosen_side(deltas)
    if side == "output":
        return covariance([delta.T for delta in deltas], "input", ridge, weights).T
    m, n = deltas[0].shape
    target, total = np.zeros((m, n)), np.zeros((n, n))
    for w, delta in zip(weights, deltas, strict=True):
        C = covariance_of(delta)
        target += w * delta @ C
        total += w * C
    if not np.any(total):
        return np.zeros((m, n))
    if ridge == 0.0:
        return target @ np.linalg.pinv(total, rcond=1e-13, hermitian=True)
    regular = total + ridge * float(np.trace(total)) / n * np.eye(n)
    return np.linalg.solve(regular, target.T).T
