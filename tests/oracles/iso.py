"""Iso-C and Iso-CTS (arXiv 2502.04959): the spectrum of the sum made flat."""

import numpy as np

from tests.oracles.tsv_m import not_zero, polar, scale, triplets_of


def iso_c(deltas, alpha=1.0):
    """alpha * mean(sigma) * U Vt of the sum of the deltas, over its numerical rank."""
    U, sigma, Vt = triplets_of(sum(deltas), scale(deltas))
    if len(sigma) == 0:
        return np.zeros(deltas[0].shape)
    return alpha * float(np.mean(sigma)) * (U @ Vt)


def dimensions(rank, tasks, common):
    """Triplets of the common space, and of each task: together the rank of the sum.

    Python's round, half to even, as in the defining repository.
    """
    wanted = round((rank - int(rank * common)) / tasks)
    of_each = min(rank // tasks, wanted)
    return rank - tasks * of_each, of_each


def iso_cts(deltas, alpha=1.0, common=0.8):
    """alpha * mean(sigma) * polar(U) polar(V)^T of common and task-specific triplets.

    The common ones are the first of the sum; a task's are the first of what is left of it when
    the common left space is projected out. The mean is over the singular values of all of them.
    """
    tasks = not_zero(deltas)
    U_sum, sigma_sum, Vt_sum = triplets_of(sum(deltas), scale(deltas))
    if len(sigma_sum) == 0:
        return np.zeros(deltas[0].shape)
    k, of_each = dimensions(len(sigma_sum), len(tasks), common)
    U_common = U_sum[:, :k]
    U, sigma, Vt = [U_common], [sigma_sum[:k]], [Vt_sum[:k]]
    for delta in tasks:
        residual = delta - U_common @ (U_common.T @ delta)
        U_t, sigma_t, Vt_t = triplets_of(residual, scale(deltas))
        U.append(U_t[:, :of_each])
        sigma.append(sigma_t[:of_each])
        Vt.append(Vt_t[:of_each])
    level = float(np.mean(np.concatenate(sigma)))
    return alpha * level * polar(np.hstack(U)) @ polar(np.vstack(Vt))
