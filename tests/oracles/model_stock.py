"""Model Stock (arXiv 2403.19522) with the floor that mergekit gives the cosines."""

from itertools import combinations

import numpy as np


def ratio(deltas, floor=1e-6):
    """t = N c / (1 + (N - 1) c) with c the mean cosine of all pairs."""
    cosines = []
    for left, right in combinations(deltas, 2):
        lengths = np.linalg.norm(left) * np.linalg.norm(right)
        divisor = max(lengths, floor) or 1.0
        cosines.append(min(1.0, max(-1.0, float(np.sum(left * right)) / divisor)))
    c, count = sum(cosines) / len(cosines), len(deltas)
    denominator = 1 + (count - 1) * c
    return 0.0 if abs(denominator) < 1e-6 else count * c / denominator


def model_stock(deltas, filter_wise=False, floor=1e-6):
    """t times the mean of the deltas; each row (last axis) by its own t where `filter_wise`."""
    mean = sum(deltas) / len(deltas)
    if not filter_wise or mean.ndim < 2:
        return ratio(deltas, floor) * mean
    rows = [delta.reshape(-1, delta.shape[-1]) for delta in deltas]
    factors = [ratio([row[i] for row in rows], floor) for i in range(len(rows[0]))]
    return (np.array(factors)[:, None] * mean.reshape(rows[0].shape)).reshape(mean.shape)
