"""Model Stock against its float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import ModelStock
from tests.merge_one import merge_one
from tests.oracles import model_stock, samples, weights


def expected(deltas, shape=(9, 7), **options):
    full = [samples.exact(delta).reshape(shape) for delta in deltas]
    return model_stock.model_stock(full, **options).reshape(deltas[0].shape)


@pytest.mark.parametrize("options", [{}, {"filter_wise": True}, {"floor": 0.0}])
@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_model_stock_is_the_reference(kind, dtype, size, options):
    deltas = weights.deltas(kind, size, dtype=dtype)
    found = weights.merged(ModelStock(**options), deltas)
    assert_near(found, expected(deltas, **options), deltas)


def assert_near(found, want, deltas):
    """t may be many times 1 where task vectors oppose each other, and errs as the cosines do."""
    mean = sum(map(samples.exact, deltas)) / len(deltas)
    t = np.max(np.abs(want) / np.where(mean == 0, 1, np.abs(mean)), initial=1.0)
    weights.assert_update(found, want, [delta.scaled(t) for delta in deltas])


@samples.SEARCH
@given(samples.any_deltas(6, 5), st.integers(2, 4), st.booleans())
def test_equal_task_vectors_stay_as_they_are(delta, copies, filter_wise):
    found = weights.merged(ModelStock(filter_wise=filter_wise, floor=0), [delta] * copies)
    weights.assert_update(found, samples.exact(delta), [delta] * copies)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_orthogonal_task_vectors_lead_back_to_the_base(filter_wise):
    deltas = [
        Dense(torch.tensor([[1.0, 0.0], [0.0, 2.0]])),
        Dense(torch.tensor([[0.0, 3], [4, 0]])),
    ]
    assert not weights.merged(ModelStock(filter_wise=filter_wise), deltas).any()


@samples.SEARCH
@given(st.permutations(range(4)), st.sampled_from(samples.KINDS), st.booleans())
def test_the_order_of_the_models_means_nothing(order, kind, filter_wise):
    deltas = weights.deltas(kind, 1.0)
    method = ModelStock(filter_wise=filter_wise)
    found = weights.merged(method, [deltas[i] for i in order])
    assert_near(found, weights.merged(method, deltas), deltas)


def test_models_that_leave_the_tensor_alone_have_the_cosine_0():
    deltas, zero = weights.deltas("dense", 1.0, 2), Dense(torch.zeros(9, 7))
    found = weights.merged(ModelStock(), deltas, tasks=3)
    assert_near(found, expected([*deltas, zero]), deltas)


def test_tiny_updates_count_as_unrelated():
    deltas = [samples.dense(9, 7).scaled(1e-5)] * 2
    with_floor = weights.merged(ModelStock(), deltas)
    without = weights.merged(ModelStock(floor=0), deltas)
    assert np.abs(with_floor).max() < 0.1 * np.abs(without).max()
    assert_near(with_floor, expected(deltas), deltas)


def test_opposite_task_vectors_are_left_out():
    delta = samples.dense(9, 7)
    assert not weights.merged(ModelStock(), [delta, delta.scaled(-1.0)]).any()


def test_adapters_stay_factored_where_the_tensor_is_one():
    deltas = weights.deltas("low-rank", 1.0)
    assert isinstance(merge_one(ModelStock(), deltas).delta, LowRank)
    assert isinstance(merge_one(ModelStock(filter_wise=True), deltas).delta, Dense)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("shape", [(5,), (), (4, 3, 2)])
def test_vectors_scalars_and_kernels(shape, filter_wise):
    deltas = [samples.dense(*shape, seed=seed) for seed in range(3)]
    found = weights.merged(ModelStock(filter_wise=filter_wise), deltas, shape=shape)
    assert_near(found, expected(deltas, shape, filter_wise=filter_wise), deltas)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_empty_and_zero_tensors_stay_so(filter_wise):
    method = ModelStock(filter_wise=filter_wise, floor=0)
    assert weights.merged(method, [samples.dense(0, 5)] * 2, shape=(0, 5)).shape == (0, 5)
    for zero in (Dense(torch.zeros(3, 4)), LowRank(torch.zeros(3, 2), torch.ones(2, 4))):
        assert not weights.merged(method, [zero] * 3).any()


def test_what_it_is_not_defined_for_is_refused():
    deltas = weights.deltas("dense", 1.0, 2)
    with pytest.raises(UsageError, match="model_stock: .* at least two"):
        merge_one(ModelStock(), deltas[:1])
    with pytest.raises(UsageError, match="model_stock: 0 has the weight 0.5"):
        merge_one(ModelStock(), deltas, weights=[0.5, 1.0])


@pytest.mark.parametrize("floor", [0.0, 1e-6])
@pytest.mark.parametrize("seed", range(8))
def test_factors_that_cancel_are_unrelated(seed, floor):
    others = [samples.low_rank(32, 24, 2, seed=seed)] * 2
    cancelling = weights.cancelling(32, 24, seed=seed)
    found = weights.merged(ModelStock(floor=floor), [cancelling, *others])
    want = model_stock.model_stock([np.zeros((32, 24)), *map(samples.exact, others)], floor=floor)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
