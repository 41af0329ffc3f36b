"""Pico (arXiv 2604.16826): shared output directions scaled down, the mean norm restored."""

import numpy as np


def calibration(Bs):
    """S = I + U diag(alpha - 1) U^T for [B_1 ... B_T] = U Sigma V^T.

    s_j = sigma_j^2 / sum(sigma^2) and alpha_j = 1 / (1 + (T - 1) s_j).
    """
    stacked = np.hstack(Bs)
    U, sigma, _ = np.linalg.svd(stacked, full_matrices=False)
    s = sigma**2 / np.sum(sigma**2)
    alpha = 1.0 / (1.0 + (len(Bs) - 1) * s)
    return np.eye(len(stacked)) + (U * (alpha - 1.0)) @ U.T


def pico(factors):
    """S B_t A_t of every task, for its factors (B_t, A_t); those of a zero task do not count."""
    S = calibration([B for B, A in factors if np.any(B) and np.any(A)])
    return [S @ B @ A for B, A in factors]


def mean_norm(merged, deltas, weights=None):
    """merged, as long as the deltas that are not zero are on average."""
    norms = np.array([np.linalg.norm(delta) for delta in deltas])
    counts = np.abs(np.ones(len(deltas)) if weights is None else np.array(weights)) * (norms > 0)
    return merged * np.average(norms, weights=counts) / np.linalg.norm(merged)
