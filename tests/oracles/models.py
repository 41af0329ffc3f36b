"""Models of several tensors for the methods that look at entries, and what oracles see of them."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from starmerge_models import merge_state
from starmerge_models.deltas import Dense, matrix_shape
from starmerge_models.methods import make_pipeline
from tests.oracles import samples
from tests.products import one_in

SHAPES = {
    "query": (9, 7),
    "value": (5, 16),
    "kernel": (4, 3, 2, 2),
    "norm": (11,),
    "gate": (),
    "empty": (0, 4),
}
"""Matrices, a kernel, a vector, a scalar and an empty tensor."""
ABSENT = {"value": {2}, "kernel": {0, 3}, "norm": {1}, "gate": {0, 1, 2}}
"""The tasks, of four, that leave a tensor alone."""
WEIGHTS = [2.0, -0.5, 0.0, 4.0]
"""One of each sign, and none that rounds an entry."""

OPTIONS = pytest.mark.parametrize(
    ("kind", "dtype", "entries", "weights"),
    one_in(2, samples.KINDS, samples.DTYPES, [samples.normal, samples.integers], [None, WEIGHTS]),
)
"""Passes a test the models' kind, dtype and entries, and weights, any two of them together."""


def models(kind, *, dtype=torch.float32, entries=samples.normal, seed=0):
    """Four models; their matrices are factored, full, or factored for two tasks of the four."""
    made = [{} for _ in range(4)]
    for number, (name, shape) in enumerate(SHAPES.items()):
        for t in sorted(set(range(4)) - ABSENT.get(name, set())):
            key = seed + 100 * number + t
            if len(shape) == 2 and (kind == "low-rank" or (kind == "mixed" and t in {0, 3})):
                r, scale = ((3, 0.5), (1, -2.0), (8, 0.25), (4, 1.0))[t]
                made[t][name] = samples.low_rank(
                    *shape, r, seed=key, dtype=dtype, scale=scale, entries=entries
                )
            else:
                made[t][name] = samples.dense(*shape, seed=key, dtype=dtype, entries=entries)
    return made


def entries(models):
    """The float32 entries of each model as float64 matrices; zeros where it has no tensor."""
    shapes = {name: delta.shape for model in models for name, delta in model.items()}
    return [
        {
            name: model[name].entries().double().numpy() if name in model else np.zeros(shape)
            for name, shape in shapes.items()
        }
        for model in models
    ]


def merge(models, method, parameters=None, weights=None):
    """What a chain makes of the models, as float64 matrices by name."""
    merged = merge_state(models, make_pipeline(method, parameters), weights=weights, threads=1)
    return {name: samples.values(delta) for name, delta in merged.items()}


def assert_same(merged, expected):
    """The merged entries are the expected ones, rounded once to float32."""
    assert merged.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(merged[name], values.astype(np.float32), err_msg=name)


def from_entries(*arrays):
    """One model for each dict of arrays, full and in float32."""
    return [
        {name: Dense(torch.tensor(x, dtype=torch.float32)) for name, x in model.items()}
        for model in arrays
    ]


def scaled(models, factor):
    """All models times a factor."""
    return [{name: delta.scaled(factor) for name, delta in model.items()} for model in models]


def flattened(models):
    """The models with every tensor as one row."""
    return [
        {name: Dense(delta.entries().reshape(1, -1)) for name, delta in model.items()}
        for model in models
    ]


def zeroed(model):
    """The model with all its entries zero."""
    return {name: Dense(torch.zeros(delta.shape)) for name, delta in model.items()}


@st.composite
def many(draw, *, max_tasks=5):
    """One to some models of up to three small tensors, which not every model changes.

    Their entries are integers times powers of two: exact in every dtype, and often tied, cancelling
    or zero.
    """
    shapes = draw(
        st.lists(
            st.tuples(samples.lengths, samples.lengths) | st.tuples(samples.lengths) | st.just(()),
            min_size=1,
            max_size=3,
        )
    )
    tasks = draw(st.integers(1, max_tasks))
    made = [{} for _ in range(tasks)]
    for number, shape in enumerate(shapes):
        members = draw(st.sets(st.integers(0, tasks - 1), min_size=1))
        for t in sorted(members):
            seed, dtype = draw(samples.seeds), draw(st.sampled_from(samples.DTYPES))
            scale = 2.0 ** draw(st.integers(-2, 2))
            if draw(st.booleans()):
                m, n = matrix_shape(shape)
                delta = samples.low_rank(
                    m,
                    n,
                    draw(st.integers(1, 3)),
                    seed=seed,
                    dtype=dtype,
                    scale=scale,
                    entries=samples.integers,
                )
            else:
                delta = samples.dense(*shape, seed=seed, dtype=dtype, entries=samples.integers)
                delta = delta.scaled(scale)
            made[t][str(number)] = delta
    return made
