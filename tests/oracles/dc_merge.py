"""DC-Merge (arXiv 2603.06242): balanced task vectors, merged in bases that cover all of them."""

import math

import numpy as np

from tests.oracles.ties import disjoint_mean
from tests.oracles.trim import order_statistic, share
from tests.oracles.tsv_m import ZERO, not_zero, polar, scale, triplets_of


def smoothed(sigma, smoothing, rho):
    """Singular values of the same sum: as they are, all equal, or falling linearly."""
    if smoothing == "none":
        return sigma
    ratio = 1.0 if smoothing == "average" else min(rho, sigma[0] / sigma[-1])
    r = len(sigma)
    falling = np.array([ratio + (1.0 - ratio) * i / max(1, r - 1) for i in range(r)])
    return np.sum(sigma) * falling / np.sum(falling)


def largest(matrix, count):
    """Entries as large as the count-th largest stay; rounding neither drops nor makes one."""
    slack = ZERO * np.linalg.norm(matrix)
    floor = max(order_statistic([matrix], min(count, matrix.size)) - slack, slack)
    return np.where(np.abs(matrix) >= floor, matrix, 0.0)


def dc_merge(deltas, alpha=1.0, smoothing="average", rho=5.0, k=0.1, triplets="all", weights=None):
    """alpha U (mask * mean of the agreeing M_t) V^T, with M_t = U^T tau_t V cut to k % entries.

    `deltas` carry their weights. At least as many entries of M_t stay as tau_t keeps triplets.
    """
    m, n = deltas[0].shape
    weights = [1.0] * len(deltas) if weights is None else weights
    weights = [w for w, delta in zip(weights, deltas, strict=True) if np.any(delta)]
    tasks = not_zero(deltas)
    if not tasks:
        return np.zeros((m, n))
    most = {"all": min(m, n), "share": max(1, min(m, n) // len(tasks))}.get(triplets, triplets)
    parts = []
    for delta in tasks:
        U_t, sigma, Vt_t = triplets_of(delta, scale(tasks))
        parts.append((U_t[:, :most], sigma[:most], Vt_t[:most]))
    U = polar(np.hstack([part[0] for part in parts]))
    Vt = polar(np.vstack([part[2] for part in parts]))
    total = U.shape[1]
    count = math.floor(share(k, total**2))
    M = []
    for U_t, sigma, Vt_t in parts:
        balanced = (U_t * smoothed(sigma, smoothing, rho)) @ Vt_t
        M.append(largest(U.T @ balanced @ Vt.T, max(count, len(sigma))))
    merged = disjoint_mean(M, weights, np.sign(sum(M)))
    mask = np.zeros((total, total))
    start = 0
    for _, sigma, _ in parts:
        end = start + len(sigma)
        mask[start:end, start:end] = 1.0
        start = end
    return alpha * U @ (mask * merged) @ Vt
