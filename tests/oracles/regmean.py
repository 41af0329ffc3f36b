"""RegMean (arXiv 2212.09849): M = (sum w delta S)(sum w S)^-1, with full matrices throughout.

S is E[x x^T] of a task's inputs, of trace one, its off-diagonal entries times a factor, with a
ridge of its mean eigenvalue, 1 / n, on the diagonal; I / n for inputs of zeros.
"""

import numpy as np


def softened(sigma, off_diagonal=0.9, ridge=1e-6):
    """S of a second moment."""
    n = len(sigma)
    if not np.any(sigma):
        return np.eye(n) / n
    unit = sigma / np.trace(sigma)
    diagonal = np.diag(np.diag(unit))
    return off_diagonal * (unit - diagonal) + diagonal + ridge / n * np.eye(n)


def regmean(deltas, sigmas, weights=None, side="columns", off_diagonal=0.9, ridge=1e-6):
    """The merge; deltas and sigmas are of all tasks."""
    weights = [1.0] * len(deltas) if weights is None else weights
    if side == "rows":
        turned = [delta.T for delta in deltas]
        return regmean(turned, sigmas, weights, "columns", off_diagonal, ridge).T
    S = [softened(sigma, off_diagonal, ridge) for sigma in sigmas]
    target = sum(w * delta @ S_t for w, delta, S_t in zip(weights, deltas, S, strict=True))
    return np.linalg.solve(sum(w * S_t for w, S_t in zip(weights, S, strict=True)), target.T).T


def objective(M, deltas, sigmas, weights, **parameters):
    """sum w tr (M - delta) S (M - delta)^T, which M minimises."""
    S = [softened(sigma, **parameters) for sigma in sigmas]
    terms = zip(weights, deltas, S, strict=True)
    return sum(w * np.trace((M - delta) @ S_t @ (M - delta).T) for w, delta, S_t in terms)
