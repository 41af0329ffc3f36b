"""ACE-Merging (arXiv 2603.02945, equations 5 to 19), input side."""

import numpy as np

from tests.oracles.tsv_m import scale, triplets_of


def centred(delta):
    """The delta less the mean of each column over the output rows (equation 5)."""
    return delta - np.mean(delta, axis=0, keepdims=True)


def heterogeneity(deltas):
    """Variance of log |delta_t|^2 over its squared mean (equation 7); 0 for one task.

    The variance divides by T - 1, as in the defining repository. Without any variance it is 0,
    also for deltas of norm 1, where the formula is 0 / 0.
    """
    energies = np.log([float(np.sum(np.square(delta))) for delta in deltas])
    if np.ptp(energies) == 0.0:
        return 0.0
    return float(np.var(energies, ddof=1) / np.mean(energies) ** 2)


def informative(deltas):
    """The tasks whose covariance is not zero: those with rows that differ."""
    return [delta for delta in deltas if np.linalg.norm(centred(delta)) > 1e-12 * scale([delta])]


def ace(deltas, eps=0.01, threshold=0.3, top=0.3):
    """Closed form with a collective prior, and spectral refinement where tasks differ in energy."""
    m, n = deltas[0].shape
    tasks = informative(deltas)
    if not tasks:
        return np.zeros((m, n))
    heterogeneous = heterogeneity(tasks) > threshold

    structures, regular = [], []
    for delta in tasks:
        structure = centred(delta).T @ centred(delta)
        ridge = eps
        if heterogeneous:
            trace = float(np.trace(structure))
            structure = structure / trace
            ridge = eps / trace
        structures.append(structure)
        regular.append(structure + ridge * np.eye(n))

    prior = np.outer(np.ones(n), np.ones(n) @ sum(structures) / n)
    if heterogeneous:
        prior = prior / np.mean([np.sum(np.square(delta)) for delta in tasks])

    target = sum(centred(delta) @ S for delta, S in zip(tasks, regular, strict=True))
    merged = np.linalg.solve((sum(regular) + prior).T, target.T).T
    if not heterogeneous:
        return merged
    return merged + refinement(tasks, structures, regular, merged, top)


def refinement(tasks, structures, regular, merged, top):
    """mean(sigma) U Vt over the leading share of merged + residual (equations 16 to 18)."""
    mean = sum(regular) / len(tasks)
    residual = sum(delta @ (S - mean) for delta, S in zip(tasks, structures, strict=True))
    U, sigma, Vt = triplets_of(merged + residual, np.linalg.norm(merged + residual))
    k = int(len(sigma) * top)
    if k == 0:
        return np.zeros_like(merged)
    return float(np.mean(sigma[:k])) * (U[:, :k] @ Vt[:k])
