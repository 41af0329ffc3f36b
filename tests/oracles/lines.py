"""LiNeS (arXiv 2410.17146): the merged update scaled by its layer, linearly.

A model is a dict from tensor name to array; layers gives (index, count) of those in a layer.
"""

import numpy as np


def one_norm(model):
    """Sum of the magnitudes of all entries."""
    return sum(float(np.sum(np.abs(x))) for x in model.values())


def slope(models, merged, weights=None, alpha=None, beta=None):
    """alpha = |sum w_t tau_t| / (|sum w_t| |M|) and beta = max(0, 1 - alpha), where not given."""
    weights = [1.0] * len(models) if weights is None else weights
    if alpha is None:
        summed = {
            name: sum(w * model[name] for w, model in zip(weights, models, strict=True))
            for name in merged
        }
        size = one_norm(merged)
        alpha = one_norm(summed) / (abs(sum(weights)) * size) if size > 0.0 else 1.0
    return alpha, max(0.0, 1.0 - alpha) if beta is None else beta


def factor(layer, alpha, beta):
    """alpha + beta l / (L - 1); alpha outside of layers, and of a single layer."""
    if layer is None or layer[1] == 1:
        return alpha
    return alpha + beta * layer[0] / (layer[1] - 1)


def lines(models, merged, layers, weights=None, alpha=None, beta=None):
    """The merged model with each tensor times its layer's factor."""
    alpha, beta = slope(models, merged, weights, alpha, beta)
    return {name: factor(layers.get(name), alpha, beta) * x for name, x in merged.items()}
