"""Subspace Boosting (arXiv 2506.16506): small singular values lifted to that of a cut."""

import numpy as np

ZERO = 1e-6
"""Singular values up to this share of the norm are no directions of a matrix in float32."""


def cut(sigma, beta):
    """The least r whose first r singular values sum to beta of all."""
    reached = np.cumsum(sigma) / np.sum(sigma) >= beta * (1 - 1e-12)
    return int(np.argmax(reached)) + 1


def subspace_boosting(merged, beta=0.01):
    """U max(sigma, sigma_r) Vt over the directions that the merged matrix has."""
    U, sigma, Vt = np.linalg.svd(merged, full_matrices=False)
    rank = int(np.sum(sigma > ZERO * np.linalg.norm(merged)))
    if rank == 0:
        return np.zeros_like(merged)
    sigma = sigma[:rank]
    return (U[:, :rank] * np.maximum(sigma, sigma[cut(sigma, beta) - 1])) @ Vt[:rank]
