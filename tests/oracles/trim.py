"""Trimming by magnitude, the first step of TIES (arXiv 2306.01708).

A model is a dict from tensor names to float64 arrays: the task vector of one task.
"""

import math
from fractions import Fraction

import numpy as np


def weighted(models, weights=None):
    """Each model times its weight; the models themselves without weights."""
    if weights is None:
        return models
    return [
        {name: weight * x for name, x in model.items()}
        for model, weight in zip(models, weights, strict=True)
    ]


def share(percent, count):
    """percent / 100 * count, exactly, of the number as it is written in decimals."""
    return Fraction(str(percent)) * count / 100


def order_statistic(arrays, rank):
    """The rank-th largest magnitude of all entries together, the largest of rank 1; 0 of none."""
    magnitudes = np.concatenate([np.abs(x).ravel() for x in arrays])
    return np.sort(magnitudes)[len(magnitudes) - rank] if len(magnitudes) else 0.0


def threshold(arrays, k):
    """The ceil(k% of the entries)-th largest magnitude."""
    return order_statistic(arrays, math.ceil(share(k, sum(x.size for x in arrays))))


def trim(models, k, scope="global"):
    """Entries of magnitude >= the threshold, zeros elsewhere; entries at the threshold stay.

    The threshold of each task is taken over all its tensors ("global") or in each ("local").
    """
    trimmed = []
    for model in models:
        kept = {}
        for name, x in model.items():
            counted = {"global": list(model.values()), "local": [x]}[scope]
            kept[name] = np.where(np.abs(x) >= threshold(counted, k), x, 0.0)
        trimmed.append(kept)
    return trimmed
