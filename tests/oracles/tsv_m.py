"""TSV-Merge (arXiv 2412.00081): leading triplets of each task, their bases orthogonalised."""

import numpy as np

ZERO = 1e-10
"""A singular value below this share of the reference length is rounding, and its vectors noise."""


def scale(deltas):
    """Sum of the Frobenius norms: what the singular values of any sum of the deltas are held to."""
    return sum(float(np.linalg.norm(delta)) for delta in deltas)


def triplets_of(matrix, reference):
    """U, sigma and Vt of the singular values above ZERO * reference."""
    U, sigma, Vt = np.linalg.svd(matrix, full_matrices=False)
    r = int(np.sum(sigma > ZERO * reference))
    return U[:, :r], sigma[:r], Vt[:r]


def polar(matrix):
    """U Vt of the singular values that are not zero; the zero matrix for a zero matrix."""
    if matrix.size == 0:
        return matrix
    U, _, Vt = triplets_of(matrix, np.linalg.norm(matrix, 2))
    return U @ Vt


def not_zero(deltas):
    """The tasks that change the tensor at all."""
    return [delta for delta in deltas if np.any(delta)]


def share(m, n, tasks):
    """floor(min(m, n) / T) triplets, but never fewer than one."""
    return max(1, min(m, n) // tasks)


def tsv_m(deltas, alpha=1.0, triplets="share"):
    """alpha * polar([U_t]) diag([sigma_t]) polar([V_t])^T over the leading triplets of each task.

    `triplets` is "share" (floor(min(m, n) / T) a task, T counting the tasks that are not zero),
    "all", or a number. A task gives at most as many as its rank.
    """
    m, n = deltas[0].shape
    tasks = not_zero(deltas)
    if not tasks:
        return np.zeros((m, n))
    U, sigma, Vt = [], [], []
    for delta in tasks:
        U_t, sigma_t, Vt_t = triplets_of(delta, scale(tasks))
        k = len(sigma_t)
        if triplets == "share":
            k = min(k, share(m, n, len(tasks)))
        elif triplets != "all":
            k = min(k, triplets)
        U.append(U_t[:, :k])
        sigma.append(sigma_t[:k])
        Vt.append(Vt_t[:k])
    return alpha * (polar(np.hstack(U)) * np.concatenate(sigma)) @ polar(np.vstack(Vt))
