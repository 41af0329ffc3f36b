"""Task arithmetic against its float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.methods import Average, TaskArithmetic
from tests.merge_one import merge_one as merge
from tests.oracles import bounds, linear, samples


def assert_is_task_arithmetic(merged, deltas, alpha):
    expected = linear.task_arithmetic([samples.exact(delta) for delta in deltas], alpha)
    error = np.abs(samples.values(merged.delta) - expected)
    assert np.all(error <= bounds.weighted_sum(deltas, alpha))
    assert set(merged.truncations) == {None}


@pytest.mark.parametrize("alpha", [0.4, 1.0, -0.3])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_task_arithmetic_is_the_reference(kind, dtype, alpha):
    deltas = samples.task_deltas(kind, dtype=dtype)
    assert_is_task_arithmetic(merge(TaskArithmetic(alpha=alpha), deltas), deltas, alpha)


@samples.SEARCH
@given(samples.task_lists(), st.sampled_from([0.0, 1.0, -1.0, 0.1]) | st.floats(-3, 3, width=16))
def test_every_shape_rank_scale_dtype_and_alpha(deltas, alpha):
    assert_is_task_arithmetic(merge(TaskArithmetic(alpha=alpha), deltas), deltas, alpha)


def test_the_default_alpha_is_0_4():
    deltas = samples.task_deltas("mixed")
    assert_is_task_arithmetic(merge(TaskArithmetic(), deltas), deltas, 0.4)


def test_the_number_of_models_does_not_divide():
    deltas = samples.task_deltas("mixed")
    assert_is_task_arithmetic(merge(TaskArithmetic(alpha=1), deltas, tasks=10), deltas, 1.0)


def test_alpha_0_gives_the_base():
    for kind in samples.KINDS:
        merged = merge(TaskArithmetic(alpha=0), samples.task_deltas(kind))
        assert not merged.delta.to_dense().any()


@pytest.mark.parametrize("kind", samples.KINDS)
def test_alpha_1_over_t_is_the_average(kind):
    deltas = samples.task_deltas(kind)
    averaged = merge(Average(), deltas)
    merged = merge(TaskArithmetic(alpha=0.25), deltas)
    np.testing.assert_array_equal(samples.values(merged.delta), samples.values(averaged.delta))


@pytest.mark.parametrize("kind", samples.KINDS)
def test_adapters_stay_factored(kind):
    merged = merge(TaskArithmetic(), samples.task_deltas(kind))
    assert isinstance(merged.delta, LowRank if kind == "low-rank" else Dense)


@pytest.mark.parametrize("shape", [(5,), (), (0, 5), (3, 0), (6, 3, 2, 2)])
def test_vectors_scalars_kernels_and_empty_tensors(shape):
    deltas = [samples.dense(*shape, seed=seed) for seed in range(3)]
    merged = merge(TaskArithmetic(alpha=0.7), deltas)
    assert_is_task_arithmetic(merged, deltas, 0.7)
    assert merged.delta.shape == deltas[0].shape


def test_zero_deltas_stay_zero():
    zeros = [LowRank(torch.zeros(4, 2), torch.ones(2, 3)), Dense(torch.zeros(4, 3))]
    assert not merge(TaskArithmetic(), zeros).delta.to_dense().any()
    deltas = [*zeros, samples.dense(4, 3)]
    assert_is_task_arithmetic(merge(TaskArithmetic(), deltas), deltas, 0.4)


def test_a_tiny_alpha_on_float16_deltas_is_not_lost():
    deltas = [samples.dense(9, 7, seed=seed, dtype=torch.float16) for seed in range(2)]
    assert_is_task_arithmetic(merge(TaskArithmetic(alpha=1e-9), deltas), deltas, 1e-9)
    assert_is_task_arithmetic(merge(TaskArithmetic(alpha=1e-9), deltas[:1]), deltas[:1], 1e-9)


def test_a_large_sum_of_float16_deltas_does_not_overflow():
    deltas = [Dense(torch.full((3, 2), 60000.0, dtype=torch.float16))] * 4
    assert_is_task_arithmetic(merge(TaskArithmetic(alpha=2), deltas), deltas, 2.0)
