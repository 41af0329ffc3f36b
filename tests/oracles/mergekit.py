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


def multislerp(vectors, weights, *, normalize=True, eps=1e-8):
    """The exponential map at the mean direction of the mean of the tangents there."""
    x = np.array([v.ravel() for v in vectors])
    w = np.array(weights, dtype=float)
    if len(x) == 1:
        return vectors[0]
    if normalize:
        w = w / w.sum()
    norms = np.linalg.norm(x, axis=1)
    u = x / (norms[:, None] + eps)
    mean = w @ u
    length = np.linalg.norm(mean)
    if length < eps and len(x) == 2:
        return (w @ x).reshape(vectors[0].shape)
    mean = mean / length
    tangents = u - (u @ mean)[:, None] * mean
    step = w @ tangents
    theta = np.linalg.norm(step) + eps
    point = np.cos(theta) * mean + np.sin(theta) / theta * step
    return (point * (norms @ w)).reshape(vectors[0].shape)


def nearswap(base, model, t):
    """Mix the model in with the weight t / |difference|, at most 1."""
    share = np.clip(t / np.maximum(np.abs(base - model), 1e-6), 0, 1)
    return share * model + (1 - share) * base


def importance(base, model):
    """|difference| times the divergence of the rows' softmax, and from where on it counts."""

    def softmax(x):
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True) + 1e-8

    p, q = softmax(model), softmax(base)
    scores = np.abs(model - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(scores, axis=None)
    first, median, third = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    return scores, median + 1.5 * (third - first)


def ram(deltas, epsilon, *, r=0.0, alpha=0.0):
    """Entries that one model changes, raised, and the mean of those that several do."""
    d = np.array(deltas)
    active = np.abs(d) > epsilon
    count = active.sum(0)
    merged = np.zeros(d.shape[1:])
    for delta, own in zip(d, active, strict=True):
        shared, alone = (own & (count > 1)).sum(), (own & (count == 1)).sum()
        share = min(shared / max(alone, epsilon), alpha) if shared else 0.0
        merged += np.where(own & (count == 1), (1 + r * share) * delta, 0.0)
        merged += np.where(own & (count > 1), delta / np.maximum(count, 1), 0.0)
    return merged
