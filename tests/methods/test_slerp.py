"""Spherical interpolation from the base to a model against its float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models import merge_state
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import Slerp, make_method
from tests.merge_one import merge_one
from tests.oracles import samples, slerp, weights


def expected(delta, base, t):
    start = weights.exact(base)
    return slerp.slerp(start, start + samples.exact(delta), t) - start


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("size", [weights.ORTHOGONAL, weights.NEAR])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_slerp_is_the_reference(kind, dtype, size, t):
    base, deltas = weights.base(9, 7, dtype=dtype), weights.deltas(kind, size, 1, dtype=dtype)
    found = weights.merged(Slerp(t=t), deltas, base)
    weights.assert_update(found, expected(deltas[0], base, t), deltas, base)


def between(base, tuned, t):
    """The interpolated weight, from the float32 delta of two float64 matrices."""
    delta = Dense(torch.from_numpy(tuned - base))
    return base + weights.merged(Slerp(t=t), [delta], torch.from_numpy(base))


matrices = st.tuples(samples.seeds, samples.seeds, st.floats(0.01, 2))


@samples.SEARCH
@given(matrices, st.floats(0, 1))
def test_the_other_way_round_it_is_1_minus_t(drawn, t):
    first, second, size = drawn
    a = samples.normal(5, 4, seed=first, dtype=torch.float32).double().numpy()
    noise = samples.normal(5, 4, seed=second, dtype=torch.float32).double().numpy()
    b = (a + size * noise).astype(np.float32).astype(np.float64)
    scale = np.abs(a).max() + np.abs(b).max() + np.abs(between(a, b, t)).max()
    np.testing.assert_allclose(
        between(a, b, t), between(b, a, 1 - t), rtol=0, atol=8 * weights.U32 * scale
    )


@samples.SEARCH
@given(samples.any_deltas(9, 7))
def test_the_ends_are_the_base_and_the_model(delta):
    base = weights.base(9, 7)
    assert not weights.merged(Slerp(t=0), [delta], base).any()
    weights.assert_update(
        weights.merged(Slerp(t=1), [delta], base), samples.exact(delta), [delta], base
    )


def test_perpendicular_weights_of_one_length_keep_it():
    a, b = np.eye(2), np.array([[0.0, 1.0], [-1.0, 0.0]])
    for t in (0.25, 0.5, 0.7):
        assert np.linalg.norm(between(a, b, t)) == pytest.approx(np.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("size", [1e-3, 0.0])
def test_an_adapter_near_the_base_stays_factored(size):
    delta = weights.deltas("low-rank", size, 1)[0]
    made = merge_one(Slerp(t=0.25), [delta], base=weights.base(9, 7))
    assert isinstance(made.delta, LowRank)
    np.testing.assert_allclose(
        samples.values(made.delta), samples.exact(delta) / 4, rtol=0, atol=1e-6 * max(size, 1e-30)
    )


@pytest.mark.parametrize("factor", [-2.0, -3.0, 0.5])
def test_weights_on_one_line_are_interpolated_on_it(factor):
    base = weights.base(9, 7)
    delta = Dense(factor * base)
    found = weights.merged(Slerp(t=0.25), [delta], base)
    np.testing.assert_allclose(found, factor / 4 * weights.exact(base), rtol=1e-6)


@pytest.mark.parametrize("length", [0.0, 1e-10])
def test_a_base_of_nearly_zeros_has_no_direction(length):
    delta = samples.dense(3, 4)
    base = length * delta.tensor
    want = np.sin(0.3 * np.pi / 2) * samples.exact(delta)
    found = weights.merged(Slerp(t=0.3), [delta], base)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    weights.assert_update(found, expected(delta, base, 0.3), [delta], base)


def test_vectors_scalars_kernels_and_empty_tensors():
    for shape in ((5,), (), (0, 5), (6, 3, 2, 2)):
        base, delta = weights.base(*shape), samples.dense(*shape, seed=1)
        found = weights.merged(Slerp(t=0.3), [delta], base, shape=shape)
        want = expected(delta, base, 0.3) if 0 not in shape else np.zeros((0, 5))
        weights.assert_update(found, want, [delta], base)


def test_what_it_is_not_defined_for_is_refused():
    two = samples.task_deltas("dense")[:2]
    with pytest.raises(UsageError, match=r"slerp: there are 2 models \(0, 1\)"):
        merge_one(Slerp(), two, base=weights.base(9, 7))
    with pytest.raises(UsageError, match="slerp: 0 has the weight 2"):
        merge_one(Slerp(), two[:1], weights=[2.0], base=weights.base(9, 7))
    with pytest.raises(UsageError, match="slerp needs the base"):
        merge_state([{"w": two[0]}], "slerp")
    for t in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="'slerp': t: "):
            make_method("slerp", {"t": t})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rest", [0.0, 3.05e-8])
def test_a_model_of_nothing_but_rounding_has_no_direction(rest, seed):
    base = samples.normal(64, 64, seed=seed)
    tiny = weights.all_but_undone(base, rest, seed=seed)
    found = weights.merged(Slerp(t=0.3), [tiny], base)
    start = weights.exact(base)
    weights.assert_update(found, slerp.slerp(start, 0 * start, 0.3) - start, [tiny], base)
