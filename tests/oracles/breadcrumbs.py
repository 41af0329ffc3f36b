"""Model Breadcrumbs (arXiv 2312.06795): both tails of each tensor's magnitudes masked, then summed.

beta and gamma are percentiles of the magnitudes: below beta lie the negligible entries, above gamma
the outliers.
"""

import math

import numpy as np

from tests.oracles.trim import order_statistic, share, weighted


def masked(x, beta, gamma):
    """The tensor without its floor(beta%) smallest and floor((100 - gamma)%) largest magnitudes.

    Entries equal to the smallest or the largest magnitude that is kept stay.
    """
    smallest = math.floor(share(beta, x.size))
    largest = math.floor(x.size - share(gamma, x.size))
    lower = order_statistic([x], x.size - smallest)
    upper = order_statistic([x], largest + 1)
    magnitude = np.abs(x)
    return np.where((magnitude >= lower) & (magnitude <= upper), x, 0.0)


def breadcrumbs(models, beta=85, gamma=99.3, alpha=0.3, weights=None):
    """alpha * sum of the masked tasks."""
    models = weighted(models, weights)
    return {
        name: alpha * sum(masked(model[name], beta, gamma) for model in models)
        for name in models[0]
    }
