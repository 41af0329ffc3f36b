"""The weighted mean of weights against its float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models import merge_state
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import Average, Linear
from tests.merge_one import merge_one
from tests.oracles import bounds, linear, samples, weights

W = [2.0, -0.5, 0.25, 1.5]


def expected(deltas, factors, base, **options):
    start = weights.exact(base)
    return linear.linear(start, [samples.exact(d) for d in deltas], factors, **options) - start


@pytest.mark.parametrize("base_weight", [0.0, 1.25])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_linear_is_the_reference(kind, dtype, normalize, base_weight):
    base, deltas = weights.base(9, 7, dtype=dtype), weights.deltas(kind, 1.0, dtype=dtype)
    method = Linear(normalize=normalize, base_weight=base_weight)
    found = weights.merged(method, deltas, base, weights=W)
    want = expected(deltas, W, base, normalize=normalize, base_weight=base_weight)
    error = 2 * bounds.weighted_sum(deltas, 2.0) + 2 * weights.U32 * np.abs(want)
    error += 64 * bounds.U64 * np.abs(weights.exact(base))
    assert np.all(np.abs(found - want) <= error)


@samples.SEARCH
@given(samples.task_lists(), st.floats(-2, 2, width=16))
def test_the_base_divides_but_adds_nothing(deltas, base_weight):
    total = len(deltas) + base_weight
    if abs(total) < 0.1:
        return
    found = weights.merged(Linear(base_weight=base_weight), deltas)
    want = sum(map(samples.exact, deltas)) / total
    assert np.all(np.abs(found - want) <= bounds.weighted_sum(deltas, 1 / total))


@pytest.mark.parametrize("kind", samples.KINDS)
def test_without_the_base_it_is_the_average(kind):
    deltas = samples.task_deltas(kind)
    left, right = (weights.merged(m, deltas, weights=W) for m in (Linear(), Average()))
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("normalize", [True, False])
def test_adapters_stay_factored_where_the_weights_sum_to_one(normalize):
    deltas, factors = samples.task_deltas("low-rank"), [0.5, 0.25, 0.75, -0.5]
    made = merge_one(Linear(normalize=normalize), deltas, weights=factors, base=weights.base(9, 7))
    assert isinstance(made.delta, LowRank)
    scaled = merge_one(Linear(normalize=False), deltas, weights=[1.0] * 4, base=weights.base(9, 7))
    assert isinstance(scaled.delta, Dense)


def test_models_that_leave_the_tensor_alone_count_with_the_base():
    base, deltas = weights.base(9, 7), samples.task_deltas("dense")[:2]
    found = weights.merged(Linear(), deltas, base, tasks=4, weights=W)
    zero = np.zeros((9, 7))
    start = weights.exact(base)
    full = [*map(samples.exact, deltas), zero, zero]
    want = linear.linear(start, full, W) - start
    assert np.all(np.abs(found - want) <= bounds.weighted_sum(deltas, 2.0))


def test_weights_that_sum_to_zero_are_refused():
    deltas = samples.task_deltas("dense")[:2]
    cancelling = [({}, [1.0, -1.0]), ({"base_weight": -2.0}, [1.0, 1.0])]
    # In float64 0.1 + 0.2 is not 0.3.
    cancelling += [({"base_weight": -0.3}, [0.1, 0.2]), ({"base_weight": 0.1}, [-0.3, 0.2])]
    for options, factors in cancelling:
        with pytest.raises(UsageError, match="linear: the weights sum to zero"):
            merge_one(Linear(**options), deltas, weights=factors)
    merge_one(Linear(base_weight=1), deltas, weights=[1.0, -1.0])


def test_a_sum_of_weights_needs_the_base():
    with pytest.raises(UsageError, match="linear needs the base"):
        merge_state([{"w": samples.dense(3, 4)}], Linear(normalize=False))
    assert merge_state([{"w": samples.dense(3, 4)}], Linear()).keys() == {"w"}


def test_a_sum_of_weights_leaves_no_tensor_behind(tiny_base, make_adapter, tmp_path):
    import starmerge_models as sm

    adapters = [make_adapter("a"), make_adapter("b", seed=1)]
    with pytest.raises(UsageError, match="linear: no model changes .* Σw = 2 would scale"):
        sm.merge(tiny_base, adapters, Linear(normalize=False), output=tmp_path / "out")
    half = [0.5, 0.5]
    sm.merge(tiny_base, adapters, Linear(normalize=False), output=tmp_path / "out", weights=half)


def test_vectors_scalars_and_empty_tensors():
    for shape in ((5,), (), (0, 5), (6, 3, 2, 2)):
        base, deltas = weights.base(*shape), [samples.dense(*shape, seed=s) for s in range(2)]
        found = weights.merged(Linear(normalize=False), deltas, base, shape=shape)
        want = sum(map(samples.exact, deltas)) + weights.exact(base)
        np.testing.assert_allclose(found, want, rtol=0, atol=4 * weights.U32 * 8)
        assert torch.is_tensor(base)
