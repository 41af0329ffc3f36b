"""TIES (arXiv 2306.01708): trim, elect a sign for each entry, average the entries that have it."""

import numpy as np

from tests.oracles.trim import trim, weighted


def elected(models):
    """gamma = sgn(sum of the tasks), by tensor; 0 where the sum is zero."""
    return {name: np.sign(sum(model[name] for model in models)) for name in models[0]}


def majority(signs):
    """The sign that most entries of the whole model have elected; 0 when neither leads."""
    return np.sign(sum(np.sum(sign) for sign in signs.values()))


def resolved(signs, zero_sign):
    """The signs, with the majority's in place of zeros ("majority") or with zeros left ("zero")."""
    substitute = {"majority": majority(signs), "zero": 0.0}[zero_sign]
    return {name: np.where(sign == 0, substitute, sign) for name, sign in signs.items()}


def disjoint_mean(entries, weights, sign):
    """sum(entry) / sum(|weight|) over the tasks whose entry has the sign; 0 where none has.

    The entries carry their weights.
    """
    total = np.zeros_like(sign)
    members = np.zeros_like(sign)
    for entry, weight in zip(entries, weights, strict=True):
        agrees = (entry != 0) & (np.sign(entry) == sign)
        total += np.where(agrees, entry, 0.0)
        members += np.where(agrees, abs(weight), 0.0)
    return np.divide(total, members, out=np.zeros_like(total), where=members > 0)


def ties(models, k=20, scope="global", lam=1.0, zero_sign="majority", weights=None):
    """lam * the disjoint mean of the trimmed tasks."""
    trimmed = trim(weighted(models, weights), k, scope)
    signs = resolved(elected(trimmed), zero_sign)
    weights = [1.0] * len(models) if weights is None else weights
    return {
        name: lam * disjoint_mean([model[name] for model in trimmed], weights, sign)
        for name, sign in signs.items()
    }
