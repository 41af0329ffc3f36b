"""Models for the merges that work on weights: a base and deltas from it, far and near."""

import numpy as np
import torch

from starmerge_models.deltas import Dense, LowRank
from tests.merge_one import merge_one
from tests.oracles import bounds, samples

U32 = bounds.U32
ORTHOGONAL, NEAR = 1.0, 1e-3
"""How large deltas are beside the base: as large, or as those of a fine-tune."""


def base(*shape, dtype=torch.float32):
    """A base's weight."""
    return samples.normal(*shape, seed=99, dtype=dtype)


def deltas(kind, size, count=4, *, dtype=torch.float32, shape=(9, 7)):
    """The first of the four deltas of a kind, times a size."""
    made = samples.task_deltas(kind, *shape, dtype=dtype)[:count]
    return [delta.scaled(size) for delta in made]


def all_but_undone(weight, rest, *, seed):
    """A delta that leaves of half of a weight's entries a share, and nothing of the others."""
    some = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return Dense(torch.where(some, rest * weight, 0.0) - weight)


def cancelling(m, n, *, seed):
    """A low-rank delta in float64 whose terms cancel but for rounding."""
    B = samples.normal(m, 2, seed=300 + seed, dtype=torch.float64)
    a = samples.normal(1, n, seed=400 + seed, dtype=torch.float64)
    return LowRank(torch.cat([B, B[:, :1] + B[:, 1:]], 1), torch.cat([a, a, -a]))


def exact(weight):
    """A stored weight as a float64 matrix."""
    return samples.exact(Dense(weight))


def merged(method, given, weight=None, **options):
    """What a method adds to the base, as a float64 matrix."""
    made = merge_one(method, given, base=weight, **options)
    return samples.values(made.delta)


def assert_update(found, expected, given, weight=None, factor=8.0):
    """The update is the expected one, to float32's rounding of its terms.

    The entries of the task vectors and the update are rounded once each, those of a low-rank result
    are products of factors that are rounded (rank + 6 roundings); coefficients are float64. What is
    not the update itself, but lost where base and result nearly cancel, is float64's.
    """
    terms = sum(bounds.magnitude(delta) for delta in given)
    ranks = sum(bounds.terms(delta) for delta in given)
    error = bounds.gamma(ranks + factor, U32) * terms + U32 * np.abs(expected)
    if weight is not None:
        error = error + 64 * bounds.U64 * np.abs(exact(weight))
    assert np.all(np.abs(found - expected) <= error)
