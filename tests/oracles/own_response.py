"""One factor for the whole merge, so that the tasks answer their own deltas with c on average.

A model is a dict from tensor name to array.
"""

import numpy as np


def inner(left, right):
    """Sum of the products of matching entries of two models."""
    return sum(float(np.sum(left[name] * right[name])) for name in left)


def mean_response(models, merged, weights=None):
    """Weighted mean of <merged, delta_t> / |delta_t|^2 over the tasks that are not zero."""
    weights = [1.0] * len(models) if weights is None else weights
    total, weight = 0.0, 0.0
    for w, model in zip(weights, models, strict=True):
        energy = inner(model, model)
        if energy > 0.0:
            total += w * inner(merged, model) / energy
            weight += w
    return total / weight


def factor(models, merged, c=0.75, weights=None):
    """f with mean_t f <merged, delta_t> / |delta_t|^2 = c."""
    return c / mean_response(models, merged, weights)


def own_response(models, merged, c=0.75, weights=None):
    """The merged model times its factor."""
    f = factor(models, merged, c, weights)
    return {name: f * values for name, values in merged.items()}
