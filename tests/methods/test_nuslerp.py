"""Spherical interpolation between two models against its float64 reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models import merge_state
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import NuSlerp
from tests.merge_one import merge_one
from tests.oracles import samples, slerp, weights

ALONG = ["tensor", "rows", "columns"]
W = [0.7, 0.4]


def expected(deltas, base, factors, of, along, shape=(9, 7)):
    first, second = (samples.exact(delta).reshape(shape) for delta in deltas)
    start = weights.exact(base).reshape(shape)
    if of == "task_vectors":
        found = slerp.nuslerp(first, second, factors, along)
    else:
        found = slerp.nuslerp(start + first, start + second, factors, along) - start
    return found.reshape(deltas[0].shape)


@pytest.mark.parametrize("size", [weights.ORTHOGONAL, weights.NEAR])
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("of", ["task_vectors", "weights"])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_nuslerp_is_the_reference(kind, dtype, of, along, size):
    base, deltas = weights.base(9, 7, dtype=dtype), weights.deltas(kind, size, 2, dtype=dtype)
    found = weights.merged(NuSlerp(of=of, along=along), deltas, base, weights=W)
    assert_near(found, expected(deltas, base, W, of, along), deltas, base)


def assert_near(found, want, deltas, base):
    """As `weights.assert_update`, and for angles: that of two weights is known to 2e-8 at worst.

    Of the difference of nearly parallel weights float64 loses what their cosine cannot say.
    """
    terms = np.abs(samples.exact(deltas[0])) + np.abs(samples.exact(deltas[1]))
    slack = 1e-9 * (terms + 1e-3 * np.abs(weights.exact(base)))
    over = np.abs(found - want) - slack
    weights.assert_update(np.where(over > 0, found, want), want, deltas, base)


@samples.SEARCH
@given(samples.any_deltas(5, 4), samples.any_deltas(5, 4), st.sampled_from(ALONG))
def test_the_order_of_the_models_means_nothing(first, second, along):
    left = weights.merged(NuSlerp(along=along), [first, second], weights=W)
    right = weights.merged(NuSlerp(along=along), [second, first], weights=W[::-1])
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5 * np.abs(left).max())


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_one_weight_alone_gives_that_model(kind, along):
    deltas = weights.deltas(kind, 1.0, 2)
    for factors, delta in (([1.0, 0.0], deltas[0]), ([0.0, 3.0], deltas[1])):
        found = weights.merged(NuSlerp(along=along), deltas, weights=factors)
        weights.assert_update(found, samples.exact(delta), deltas)


@pytest.mark.parametrize("rest", [0.0, 5e-7])
def test_weights_that_nearly_cancel_mean_the_middle(rest):
    deltas = weights.deltas("dense", 1.0, 2)
    found = weights.merged(NuSlerp(), deltas, weights=[1.0 + rest, -1.0])
    np.testing.assert_array_equal(found, weights.merged(NuSlerp(), deltas, weights=[1.0, 1.0]))


def test_a_model_that_leaves_the_tensor_alone_counts_as_orthogonal():
    delta = samples.dense(9, 7)
    found = weights.merged(NuSlerp(), [delta], tasks=2, weights=[1.0, 1.0])
    np.testing.assert_allclose(found, np.sin(np.pi / 4) * samples.exact(delta), rtol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_parallel_task_vectors_are_interpolated_on_their_line(factor):
    delta = samples.dense(9, 7)
    found = weights.merged(NuSlerp(), [delta, delta.scaled(factor)], weights=[3.0, 1.0])
    want = (3 + factor) / 4 * samples.exact(delta)
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)


def test_adapters_stay_factored_where_the_tensor_is_one_vector():
    deltas = weights.deltas("low-rank", 1.0, 2)
    kinds = {along: type(merge_one(NuSlerp(along=along), deltas).delta) for along in ALONG}
    assert kinds == {"tensor": LowRank, "rows": Dense, "columns": Dense}


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("of", ["task_vectors", "weights"])
@pytest.mark.parametrize("shape", [(5,), (), (4, 3, 2)])
def test_vectors_scalars_and_kernels(shape, of, along):
    base, deltas = weights.base(*shape), [samples.dense(*shape, seed=s) for s in range(2)]
    found = weights.merged(NuSlerp(of=of, along=along), deltas, base, weights=W, shape=shape)
    assert_near(found, expected(deltas, base, W, of, along, shape), deltas, base)


@pytest.mark.parametrize("along", ALONG)
def test_empty_and_zero_tensors_stay_so(along):
    empty = [samples.dense(0, 5)] * 2
    assert weights.merged(NuSlerp(along=along), empty, shape=(0, 5)).shape == (0, 5)
    zeros = [samples.dense(3, 4).scaled(0.0)] * 2
    assert not weights.merged(NuSlerp(along=along), zeros).any()


@pytest.mark.parametrize("count", [1, 3])
def test_other_than_two_models_are_refused(count):
    with pytest.raises(UsageError, match=f"nuslerp: it merges exactly two.*is {count}"):
        merge_one(NuSlerp(), weights.deltas("dense", 1.0, count))


def test_only_weights_need_the_base():
    models = [{"w": delta} for delta in weights.deltas("dense", 1.0, 2)]
    assert merge_state(models, NuSlerp()).keys() == {"w"}
    with pytest.raises(UsageError, match="nuslerp needs the base"):
        merge_state(models, NuSlerp(of="weights"))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("rest", [0.0, 3.05e-8])
def test_weights_of_nothing_but_rounding_have_no_direction(rest, along, seed):
    base, delta = samples.normal(64, 64, seed=seed), samples.dense(64, 64, seed=50 + seed)
    tiny = weights.all_but_undone(base, rest, seed=seed)
    found = weights.merged(NuSlerp(of="weights", along=along), [tiny, delta], base, weights=W)
    start = weights.exact(base)
    want = slerp.nuslerp(0 * start, samples.exact(delta) + start, W, along) - start
    weights.assert_update(found, want, [tiny, delta], base)


@pytest.mark.parametrize("seed", range(8))
def test_factors_that_cancel_count_as_orthogonal(seed):
    other = samples.low_rank(32, 24, 2, seed=seed)
    found = weights.merged(NuSlerp(), [weights.cancelling(32, 24, seed=seed), other])
    np.testing.assert_allclose(found, np.sin(np.pi / 4) * samples.exact(other), rtol=0, atol=1e-5)
