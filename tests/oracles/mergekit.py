"""mergekit 0.1.5's task-arithmetic family on one tensor, and how it takes settings from recipes."""

import numpy as np

from tests.oracles.della import rescaled_l1


def by_magnitude(delta, density):
    """The int(density * n) largest, at least one; of equals the first."""
    if density <= 0:
        return np.zeros(delta.shape, dtype=bool)
    return _largest(delta, max(1, int(density * delta.size)))


def between_outliers(delta, density, gamma):
    """Drop int(gamma * n) at the top, keep the next int(density * n); all of them must fit."""
    n = delta.size
    keep = int(density * n)
    bottom = max(0, n - keep - int(gamma * n))
    descending = np.argsort(-np.abs(delta).ravel().astype(np.float32), kind="stable")
    mask = np.zeros(n, dtype=bool)
    mask[descending[n - bottom - keep : n - bottom]] = True
    return mask.reshape(delta.shape)


def thinned(delta, mask, rescale):
    """The entries that stay."""
    return rescaled_l1(delta, mask) if rescale else np.where(mask, delta, 0.0)


def merged(deltas, weights, *, consensus, normalize, lam=1.0):
    """Weight, elect signs, sum what agrees, divide by its weights, scale."""
    x = [w * d for w, d in zip(weights, deltas, strict=True)]
    if consensus:
        sign = np.where(sum(x) >= 0, 1, -1)
        agrees = [np.sign(one) == sign for one in x]
        total = sum(np.where(yes, one, 0.0) for yes, one in zip(agrees, x, strict=True))
        mass = sum(np.where(yes, w, 0.0) for yes, w in zip(agrees, weights, strict=True))
        mass = np.where(mass == 0, 1.0, mass)
    else:
        total, mass = sum(x), sum(weights)
        mass = 1.0 if abs(mass) < 1e-8 else mass
    return lam * (total / mass if normalize else total)


def _largest(delta, count):
    mask = np.zeros(delta.size, dtype=bool)
    mask[np.argsort(-np.abs(delta).ravel().astype(np.float32), kind="stable")[:count]] = True
    return mask.reshape(delta.shape)
