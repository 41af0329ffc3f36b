"""What the tests of spectral merges share: how to merge, how far from exact, deltas of one sort."""

import numpy as np
import torch

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.merging.in_memory import merge_state
from starmerge_models.methods import Deltas, TensorContext
from tests.oracles import bounds, samples

SHAPES = [(9, 7), (30, 20), (12, 40), (40, 12)]
"""The ranks of samples.task_deltas, 16 in all: above both sides, below both, above one of them."""


def merge(method, deltas, weights=None):
    """Merge one tensor's deltas as a model of that tensor; None is a task that leaves it alone."""
    models = [{} if delta is None else {"weight": delta} for delta in deltas]
    return merge_state(models, method, weights=weights, threads=1)["weight"]


def merged(method, deltas, weights=None):
    """What merge() stores, multiplied out in float64."""
    return samples.exact(merge(method, deltas, weights))


def given(deltas):
    """Deltas as a method gets them."""
    return Deltas({t: lambda delta=delta: delta for t, delta in enumerate(deltas)})


def context(deltas, *, shape=None, is_embedding=False, weights=None):
    """The context of a tensor that all tasks change."""
    tasks = tuple(map(str, range(len(deltas))))
    weights = weights or (1.0,) * len(deltas)
    return TensorContext("weight", shape or deltas[0].shape, is_embedding, tasks, weights)


def rounding(expected, deltas, condition=1e4):
    """Frobenius error of a result that is computed in float64 and stored in float32.

    Stored as a matrix M: u |M|. As factors Q R, Q with p orthonormal columns, |dQ| <= u |Q| and
    |dR| <= u |R| entry by entry give u (sqrt(p) |M|_2 + |M|). The float64 part is a modest multiple
    of u64 of the deltas times the condition of the problem; 1e4 leaves it below u.
    """
    m, n = expected.shape
    stored = np.sqrt(min(m, n)) * np.linalg.norm(expected, 2) + np.linalg.norm(expected)
    size = sum(float(np.linalg.norm(samples.exact(delta))) for delta in deltas)
    return bounds.U32 * stored + 8 * (m + n) * bounds.U64 * condition * size


def assert_close(found, expected, deltas, *, condition=1e4, times=1.0):
    """The result is the expected one but for `times` the rounding."""
    assert np.all(np.isfinite(found))
    error = np.linalg.norm(found - expected)
    assert error <= times * rounding(expected, deltas, condition), error


def orthogonal_tasks(m=24, n=18, tasks=3, r=2):
    """Low-rank deltas, exact in float64, with no direction in common on either side."""
    left = torch.from_numpy(samples.orthogonal(m, seed=1))
    right = torch.from_numpy(samples.orthogonal(n, seed=2))
    sigma = 1.0 + torch.arange(tasks * r).double().view(r, tasks).T
    own = [slice(t * r, (t + 1) * r) for t in range(tasks)]
    return [LowRank(left[:, at] * sigma[t], right[:, at].T) for t, at in enumerate(own)]


def shared_A(m=24, n=18, tasks=4, r=3, dtype=torch.float32):
    """Adapters with one A, as if it had been frozen: their rows span one space."""
    A = samples.normal(r, n, seed=9, dtype=dtype)
    return [LowRank(samples.normal(m, r, seed=20 + t, dtype=dtype), A) for t in range(tasks)]


def parallel_columns(m=24, n=18, tasks=3):
    """Adapters of rank one written with three parallel columns each."""
    return [
        LowRank(
            samples.integers(m, 1, seed=40 + t) @ torch.tensor([[1.0, -2.0, 0.5]]),
            samples.normal(3, n, seed=50 + t),
        )
        for t in range(tasks)
    ]


def as_dense(deltas, dtype=torch.float64):
    """The same deltas as matrices."""
    return [Dense(torch.from_numpy(samples.exact(delta)).to(dtype)) for delta in deltas]


def zero(m, n):
    """The delta of an adapter that was never trained: B is zero."""
    return LowRank(torch.zeros(m, 2), samples.normal(2, n, seed=77))
