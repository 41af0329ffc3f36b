"""The Karcher mean against its float64 reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models import merge_state
from starmerge_models.deltas import Dense
from starmerge_models.errors import UsageError
from starmerge_models.methods import Karcher, Slerp
from tests.merge_one import merge_one
from tests.oracles import karcher, samples, weights


def expected(deltas, base, *, with_base=False, **options):
    start = weights.exact(base)
    models = [start + samples.exact(delta) for delta in deltas] + [start] * with_base
    return karcher.karcher(models, **options) - start


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_iter": 1}, {"tol": 1e-2, "max_iter": 50}])
@pytest.mark.parametrize("size", [weights.ORTHOGONAL, weights.NEAR])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_karcher_is_the_reference(kind, size, options, with_base):
    base, deltas = weights.base(9, 7), weights.deltas(kind, size)
    found = weights.merged(Karcher(with_base=with_base, **options), deltas, base)
    want = expected(deltas, base, with_base=with_base, **options)
    weights.assert_update(found, want, deltas, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_karcher_of_models_stored_in_16_bits(dtype):
    base, deltas = weights.base(9, 7, dtype=dtype), weights.deltas("mixed", 0.1, dtype=dtype)
    weights.assert_update(
        weights.merged(Karcher(), deltas, base), expected(deltas, base), deltas, base
    )


@samples.SEARCH
@given(samples.any_deltas(6, 5), st.integers(1, 4))
def test_copies_of_one_model_give_it_back(delta, copies):
    base = weights.base(6, 5)
    found = weights.merged(Karcher(), [delta] * copies, base)
    weights.assert_update(found, samples.exact(delta), [delta] * copies, base)


@samples.SEARCH
@given(st.permutations(range(4)), st.sampled_from(samples.KINDS))
def test_the_order_of_the_models_means_nothing(order, kind):
    base, deltas = weights.base(9, 7), weights.deltas(kind, 0.3)
    found = weights.merged(Karcher(), [deltas[i] for i in order], base)
    weights.assert_update(found, weights.merged(Karcher(), deltas, base), deltas, base)


def test_two_models_of_one_length_meet_in_the_middle_of_their_arc():
    base = torch.tensor([[2.0, 0.0]])
    delta = Dense(torch.tensor([[-2.0, 2.0]]))
    found = weights.merged(Karcher(with_base=True), [delta], base)
    middle = np.array([[math.sqrt(2), math.sqrt(2)]])
    np.testing.assert_allclose(found + weights.exact(base), middle, rtol=1e-6)
    np.testing.assert_allclose(found, weights.merged(Slerp(t=0.5), [delta], base), rtol=1e-6)


def test_models_that_leave_the_tensor_alone_count_with_the_base():
    base, delta = weights.base(9, 7), samples.dense(9, 7)
    zero = Dense(torch.zeros(9, 7))
    found = weights.merged(Karcher(), [delta], base, tasks=3)
    np.testing.assert_array_equal(found, weights.merged(Karcher(), [delta, zero, zero], base))


def test_a_model_of_zeros_has_no_direction_but_a_length():
    base, deltas = weights.base(9, 7), [Dense(-weights.base(9, 7)), samples.dense(9, 7)]
    found = weights.merged(Karcher(), deltas, base)
    weights.assert_update(found, expected(deltas, base), deltas, base)


def test_opposite_models_and_zeros_alone_stay_finite():
    base = weights.base(9, 7)
    for deltas in ([Dense(-2 * base), Dense(0 * base)], [Dense(-base)]):
        found = weights.merged(Karcher(), deltas, base)
        assert np.isfinite(found).all()
    np.testing.assert_allclose(found, -weights.exact(base), rtol=1e-7)


def test_vectors_scalars_kernels_and_empty_tensors():
    for shape in ((5,), (), (0, 5), (6, 3, 2, 2)):
        base, deltas = weights.base(*shape), [samples.dense(*shape, seed=s) for s in range(2)]
        deltas = [delta.scaled(0.1) for delta in deltas]
        found = weights.merged(Karcher(), deltas, base, shape=shape)
        want = expected(deltas, base) if 0 not in shape else np.zeros((0, 5))
        weights.assert_update(found, want, deltas, base)


def test_what_it_is_not_defined_for_is_refused():
    deltas = samples.task_deltas("dense")
    with pytest.raises(UsageError, match="karcher: 1 has the weight 2"):
        merge_one(Karcher(), deltas, weights=[1.0, 2.0, 1.0, 1.0], base=weights.base(9, 7))
    with pytest.raises(UsageError, match="karcher needs the base"):
        merge_state([{"w": deltas[0]}], "karcher")


@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rest", [0.0, 3.05e-8])
def test_a_model_of_nothing_but_rounding_has_no_direction(rest, seed, size):
    base = size * samples.normal(64, 64, seed=seed)
    delta = samples.dense(64, 64, seed=50 + seed).scaled(size)
    tiny = weights.all_but_undone(base, rest, seed=seed)
    found = weights.merged(Karcher(with_base=True), [tiny, delta], base)
    want = expected([Dense(-base), delta], base, with_base=True)
    weights.assert_update(found, want, [tiny, delta], base)
