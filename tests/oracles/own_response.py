"""One factor for the whole merge, so that the tasks answer their own deltas with c on average.

A model is a dict from tensor name to array.
"""

import numpy as np


def inner(left, right):
    """Sum of the products of matching entries of two models."""
    return sum(float(np.sum(left[name] * right[name])) for name in left)


def mean_response(models, merged, weights=None):
    """sum_t w_t <merged, delta_t> / sum_t |w_t| |delta_t|^2."""
    weights = [1.0] * len(models) if weights is None else weights
    agreement = sum(w * inner(m, merged) for w, m in zip(weights, models, strict=True))
    return agreement / sum(abs(w) * inner(m, m) for w, m in zip(weights, models, strict=True))


def factor(models, merged, c=0.75, weights=None):
    """f with which the mean response of f merged is c."""
    return c / mean_response(models, merged, weights)


def own_response(models, merged, c=0.75, weights=None):
    """The merged model times its factor."""
    f = factor(models, merged, c, weights)
    return {name: f * values for name, values in merged.items()}
