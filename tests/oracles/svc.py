"""Singular value calibration (arXiv 2602.05536, Algorithm 1): a step after any merge."""

import numpy as np

from tests.oracles.tsv_m import ZERO, triplets_of


def projection(merged_response, response, length):
    """s = <a_merged, a_t> / |a_t|^2 (equation 8); 0 for a task without a response.

    `length` is the norm of the whole delta: a response below ZERO of it is rounding.
    """
    if np.linalg.norm(response) <= ZERO * length:
        return 0.0
    return float(merged_response @ response) / float(response @ response)


def factors(merged, deltas, alpha=None):
    """gamma_r = T / sum(max(alpha, s_t^r)) of each left direction; alpha is 1 / T by default."""
    alpha = 1.0 / len(deltas) if alpha is None else alpha
    U, sigma, Vt = triplets_of(merged, np.linalg.norm(merged))
    gamma = np.empty(len(sigma))
    for r in range(len(sigma)):
        total = 0.0
        for delta in deltas:
            s = projection(sigma[r] * Vt[r], U[:, r] @ delta, np.linalg.norm(delta))
            total += max(alpha, s)
        gamma[r] = len(deltas) / total
    return gamma


def svc(merged, deltas, alpha=None):
    """sum of gamma_r sigma_r u_r v_r^T over the triplets of the merged matrix."""
    U, sigma, Vt = triplets_of(merged, np.linalg.norm(merged))
    return (U * (factors(merged, deltas, alpha) * sigma)) @ Vt
