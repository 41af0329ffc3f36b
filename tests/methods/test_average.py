"""The average of deltas against its float64 reference."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.methods import Average
from tests.merge_one import merge_one
from tests.oracles import bounds, linear, samples

merge = partial(merge_one, Average())


def assert_is_average(merged, deltas):
    expected = linear.average([samples.exact(delta) for delta in deltas])
    error = np.abs(samples.values(merged.delta) - expected)
    assert np.all(error <= bounds.weighted_sum(deltas, 1 / len(deltas)))
    assert set(merged.truncations) == {None}


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), [(9, 7), (5, 16)])
def test_average_is_the_reference(m, n, kind, dtype):
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    assert_is_average(merge(deltas), deltas)


@samples.SEARCH
@given(samples.task_lists())
def test_every_shape_rank_scale_and_dtype(deltas):
    assert_is_average(merge(deltas), deltas)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_models_that_leave_the_tensor_alone_count_as_zero(kind):
    deltas = samples.task_deltas(kind)
    merged = merge(deltas, tasks=10)
    expected = sum(map(samples.exact, deltas)) / 10
    error = np.abs(samples.values(merged.delta) - expected)
    assert np.all(error <= bounds.weighted_sum(deltas, 1 / 10))


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_copies_of_one_full_finetune_give_it_back_exactly(dtype, copies):
    delta = samples.dense(9, 7, dtype=dtype)
    np.testing.assert_array_equal(
        samples.values(merge([delta] * copies).delta), samples.exact(delta)
    )


def test_opposite_deltas_cancel():
    for delta in (samples.low_rank(9, 7, 3), samples.dense(9, 7)):
        merged = merge([delta, delta.scaled(-1.0)])
        error = np.abs(samples.values(merged.delta))
        assert np.all(error <= bounds.weighted_sum([delta, delta], 1 / 2))


@pytest.mark.parametrize("kind", samples.KINDS)
def test_adapters_stay_factored(kind):
    merged = merge(samples.task_deltas(kind))
    assert isinstance(merged.delta, LowRank if kind == "low-rank" else Dense)


@pytest.mark.parametrize("shape", [(5,), (), (0, 5), (3, 0), (6, 3, 2, 2)])
def test_vectors_scalars_kernels_and_empty_tensors(shape):
    deltas = [samples.dense(*shape, seed=seed) for seed in range(3)]
    assert_is_average(merge(deltas), deltas)
    assert merge(deltas).delta.shape == deltas[0].shape


def test_zero_deltas_stay_zero():
    zeros = [LowRank(torch.zeros(4, 2), torch.ones(2, 3)), Dense(torch.zeros(4, 3))]
    assert not merge(zeros).delta.to_dense().any()
    assert_is_average(merge([*zeros, samples.dense(4, 3)]), [*zeros, samples.dense(4, 3)])


def test_embeddings_are_averaged_like_everything():
    deltas = samples.task_deltas("mixed")
    assert_is_average(merge(deltas, is_embedding=True), deltas)


def test_scales_1e_minus_6_and_1e6_side_by_side():
    deltas = [samples.low_rank(9, 7, 4, seed=s, scale=10.0**e) for s, e in ((1, -6), (2, 6))]
    assert_is_average(merge(deltas), deltas)
    difference = samples.values(merge(deltas[:1], tasks=2).delta) - samples.exact(deltas[0]) / 2
    assert np.all(np.abs(difference) <= bounds.weighted_sum(deltas[:1], 1 / 2))


def test_the_inputs_are_left_alone():
    deltas = samples.task_deltas("dense")
    before = [samples.exact(delta).copy() for delta in deltas]
    merge(deltas)
    for delta, values in zip(deltas, before, strict=True):
        np.testing.assert_array_equal(samples.exact(delta), values)
