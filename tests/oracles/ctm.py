"""CtM (arXiv 2606.03723): a Tucker-2 decomposition of the rescaled deltas, r x r coordinates."""

import math

import numpy as np

from tests.oracles.dc_merge import largest
from tests.oracles.ties import disjoint_mean
from tests.oracles.trim import share
from tests.oracles.tsv_m import not_zero, scale, triplets_of


def rescaled(tasks, beta):
    """(beta |tau_t| + (1 - beta) mean |tau|) tau_t / |tau_t|, as a tensor (m, n, T)."""
    norms = [np.linalg.norm(tau) for tau in tasks]
    mean = sum(norms) / len(norms)
    return np.stack(
        [
            (beta * norm + (1.0 - beta) * mean) * tau / norm
            for tau, norm in zip(tasks, norms, strict=True)
        ],
        axis=-1,
    )


def leading(tensor, mode, r, reference):
    """The first r left singular vectors of an unfolding, but none of those that are not there."""
    unfolded = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
    return triplets_of(unfolded, reference)[0][:, :r]


def tucker2(X, r, tolerance=1e-6, most=1000):
    """Bases U (m, r) and V (n, r) by HOOI from HOSVD, and the relative error after each step."""
    size = sum(float(np.linalg.norm(X[:, :, t])) for t in range(X.shape[2]))
    V = leading(X, 1, r, size)
    errors = []
    for _ in range(most):
        U = leading(np.einsum("mnt,nb->mbt", X, V), 0, r, size)
        V = leading(np.einsum("mnt,ma->ant", X, U), 1, r, size)
        core = np.einsum("mnt,ma,nb->abt", X, U, V)
        errors.append(math.sqrt(abs(np.sum(X**2) - np.sum(core**2)) / np.sum(X**2)))
        if len(errors) > 2 and abs(errors[-2] - errors[-1]) < tolerance:
            break
    return U, V, errors


def ctm(deltas, rank=None, beta=0.25, rule="ties", k=20.0, lam=1.0, weights=None):
    """lam U (merged U^T tau_t V) V^T; `deltas` carry their weights."""
    weights = [1.0] * len(deltas) if weights is None else weights
    kept = [w for w, delta in zip(weights, deltas, strict=True) if np.any(delta)]
    tasks = not_zero(deltas)
    if not tasks:
        return np.zeros(deltas[0].shape)
    r = rank or max(len(triplets_of(tau, scale(tasks))[1]) for tau in tasks)
    U, V, _ = tucker2(rescaled(tasks, beta), r)
    coordinates = [U.T @ tau @ V for tau in tasks]
    if rule == "ties":
        count = math.ceil(share(k, coordinates[0].size))
        cut = [largest(O_t, count) for O_t in coordinates]
        merged = disjoint_mean(cut, kept, np.sign(sum(cut)))
    else:
        merged = sum(coordinates) / (sum(weights) if rule == "mean" else 1.0)
    return lam * U @ merged @ V.T
