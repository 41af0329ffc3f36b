"""WUDI (arXiv 2503.08099): Adam (arXiv 1412.6980, Algorithm 1) on the interference of a layer."""

import numpy as np


def objective(M, deltas, weights=None):
    """sum w_t |(M - delta_t) delta_t^T|^2 / |delta_t|^2 over the tasks that are not zero."""
    weights = [1.0] * len(deltas) if weights is None else weights
    return sum(
        w * np.sum(np.square((M - delta) @ delta.T)) / np.sum(np.square(delta))
        for w, delta in zip(weights, deltas, strict=True)
        if np.any(delta)
    )


def gradient(M, deltas, weights):
    """Of the objective: sum 2 w_t (M - delta_t) delta_t^T delta_t / |delta_t|^2."""
    total = np.zeros_like(M)
    for w, delta in zip(weights, deltas, strict=True):
        if np.any(delta):
            total += 2 * w * (M - delta) @ (delta.T @ delta) / np.sum(np.square(delta))
    return total


def wudi(deltas, steps=300, lr=1e-5, weights=None):
    """The weighted sum of the deltas after some steps of Adam with its default rates."""
    weights = [1.0] * len(deltas) if weights is None else weights
    theta = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, steps + 1):
        g = gradient(theta, deltas, weights)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        theta = theta - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return theta
