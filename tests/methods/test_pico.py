"""Pico and the mean norm against their float64 references, and what calibration means."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.merging.in_memory import merge_state
from starmerge_models.methods import MeanNorm, Pico, Star, make_pipeline
from tests.merge_one import given as as_deltas
from tests.merge_one import merge_one
from tests.oracles import bounds, pico, samples, spectral
from tests.oracles import deltas as oracle

SHAPES = [*spectral.SHAPES, (9, 40)]


def factors(delta):
    """(B, A) of an adapter, its scale in B; (tau, I) of a full fine-tune."""
    if isinstance(delta, LowRank):
        return float(delta.scale) * oracle.exact(delta.B), oracle.exact(delta.A)
    return samples.exact(delta), np.eye(delta.shape[1])


def calibrated(deltas, **context):
    """What the transform makes of each delta of one tensor."""
    tensor = spectral.context(deltas, **context)
    found = Pico().prepare_tensor(as_deltas(deltas), tensor, None)
    return [Pico().apply(delta, t, tensor, found)[0] for t, delta in enumerate(deltas)]


def assert_is_pico(found, deltas):
    for delta, task, expected in zip(
        found, deltas, pico.pico(list(map(factors, deltas))), strict=True
    ):
        assert type(delta) is type(task)
        # One rounding to float32, of the matrix or of B; the float64 part has a condition below T.
        size = bounds.magnitude(delta)
        slack = 1e-12 * np.linalg.norm(bounds.magnitude(task))
        assert np.all(np.abs(samples.exact(delta) - expected) <= 2 * bounds.U32 * size + slack)


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_pico_is_the_reference(m, n, kind, dtype):
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    assert_is_pico(calibrated(deltas), deltas)


@samples.SEARCH
@given(st.integers(0, 100), samples.lengths, samples.lengths, st.lists(samples.ranks, min_size=2))
def test_every_shape_and_rank(seed, m, n, ranks):
    deltas = [samples.low_rank(m, n, r, seed=seed + t) for t, r in enumerate(ranks[:5])]
    assert_is_pico(calibrated(deltas), deltas)


@pytest.mark.parametrize("merge", ["task_arithmetic", "average", "ties", "tsv_m"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, -2.0, 4.0]])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_chain_is_calibration_merge_and_mean_norm(kind, weights, merge):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(make_pipeline(f"pico+{merge}+mean_norm"), deltas, weights)
    before = spectral.merged(make_pipeline(merge), calibrated(deltas), weights)
    expected = pico.mean_norm(before, list(map(samples.exact, deltas)), weights)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.linalg.norm(expected))


def test_one_direction_of_all_tasks_becomes_a_share_of_one_and_no_other_changes():
    u, v = samples.normal(12, 1, seed=1), samples.normal(5, 9, seed=2)
    deltas = [LowRank(u * (t + 1), v[[t]]) for t in range(5)]
    for found, delta in zip(calibrated(deltas), deltas, strict=True):
        np.testing.assert_allclose(samples.exact(found), samples.exact(delta) / 5, rtol=1e-6)


def test_tasks_with_outputs_of_their_own_keep_their_proportions():
    # Three orthogonal directions of equal size: each has a third, so each becomes 1/(1 + 2/3).
    deltas = [LowRank(torch.eye(7)[:, [t]], samples.normal(1, 5, seed=t)) for t in range(3)]
    for found, delta in zip(calibrated(deltas), deltas, strict=True):
        np.testing.assert_allclose(samples.exact(found), samples.exact(delta) * 0.6, rtol=1e-6)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_order_of_the_tasks_does_not_matter(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    expected = calibrated(deltas)
    for t, found in enumerate(reversed(calibrated(deltas[::-1]))):
        size = np.linalg.norm(samples.exact(deltas[t]))
        difference = samples.exact(found) - samples.exact(expected[t])
        assert np.linalg.norm(difference) <= 1e-6 * size


@pytest.mark.parametrize("kind", samples.KINDS)
def test_zeros_and_tasks_that_leave_the_tensor_alone_do_not_count(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    expected = spectral.merged(make_pipeline("pico+task_arithmetic"), deltas)
    extended = [deltas[0], None, spectral.zero(30, 20), *deltas[1:], Dense(torch.zeros(30, 20))]
    found = spectral.merged(make_pipeline("pico+task_arithmetic"), extended)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.linalg.norm(expected))


@pytest.mark.parametrize(
    "deltas",
    [
        [samples.low_rank(6, 5, 2)],
        [samples.dense(6, 5)],
        [samples.low_rank(6, 5, 2), spectral.zero(6, 5)],
        [spectral.zero(6, 5)] * 2,
        [Dense(torch.zeros(6, 5))] * 2,
        [samples.dense(7, seed=t) for t in range(2)],
    ],
)
def test_one_task_zeros_and_vectors_stay_as_they_are(deltas):
    shape = getattr(deltas[0], "layout", deltas[0].shape)
    for found, delta in zip(calibrated(deltas, shape=shape), deltas, strict=True):
        assert found is delta


@pytest.mark.parametrize("kind", samples.KINDS)
def test_embeddings_stay_as_they_are(kind):
    deltas = samples.task_deltas(kind)
    assert calibrated(deltas, is_embedding=True) == deltas


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 3), ()])
def test_empty_tensors_and_scalars(shape):
    deltas = [Dense(torch.ones(shape))] * 2
    found = spectral.merged(make_pipeline("pico+average+mean_norm"), deltas)
    assert found.shape == deltas[0].shape


def test_adapters_stay_factored_and_keep_A():
    deltas = samples.task_deltas("low-rank", 30, 20)
    for found, delta in zip(calibrated(deltas), deltas, strict=True):
        assert found.A is delta.A and found.scale == delta.scale and found.rank == delta.rank


def test_pico_sees_what_the_transforms_before_it_leave():
    deltas = samples.task_deltas("low-rank", 30, 20)
    tensor = spectral.context(deltas)
    cut = [Star(eta=50).apply(delta, t, tensor, None)[0] for t, delta in enumerate(deltas)]
    found = merge_one(make_pipeline("star+pico+average", {"eta": 50}), deltas)
    expected = merge_one(make_pipeline("pico+average"), cut)
    np.testing.assert_array_equal(samples.exact(found.delta), samples.exact(expected.delta))
    assert None not in found.truncations


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, -2.0, 4.0]])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_mean_norm_is_the_reference_tensor_by_tensor(kind, weights):
    first = samples.task_deltas(kind, 30, 20)
    second = [delta.scaled(0.25) for delta in samples.task_deltas(kind, 12, 40, seed=100)]
    models = [{"a": a, "b": b} for a, b in zip(first, second, strict=True)]
    del models[1]["b"]
    models[2]["b"] = spectral.zero(12, 40)
    before = merge_state(models, "iso_c", weights=weights)
    found = merge_state(models, make_pipeline("iso_c+mean_norm"), weights=weights)
    w = weights or [1.0] * 4
    for name, own in (("a", [0, 1, 2, 3]), ("b", [0, 2, 3])):
        tau = [samples.exact(models[t][name]) for t in own]
        M = samples.exact(before[name])
        expected = pico.mean_norm(M, tau, [w[t] for t in own])
        np.testing.assert_allclose(
            samples.exact(found[name]), expected, rtol=0, atol=1e-6 * np.linalg.norm(expected)
        )


def test_mean_norm_leaves_what_only_rounding_is_left_of():
    delta = samples.low_rank(9, 7, 2)
    for pair in ([delta, delta.scaled(-1.0)], spectral.as_dense([delta, delta.scaled(-1.0)])):
        found = spectral.merged(make_pipeline("average+mean_norm"), pair)
        np.testing.assert_array_equal(found, spectral.merged("average", pair))
        assert np.linalg.norm(found) <= 1e-6 * np.linalg.norm(samples.exact(delta))
    zeros = spectral.merged(make_pipeline("average+mean_norm"), [spectral.zero(9, 7)] * 2)
    assert not zeros.any()


@pytest.mark.parametrize("step", ["scale", "own_response"])
def test_factors_before_mean_norm_are_refused(step):
    with pytest.raises(UsageError, match=f"mean_norm: .* {step} before it .*Leave {step} out"):
        make_pipeline(f"average+{step}+mean_norm")
    assert make_pipeline(f"average+mean_norm+{step}").post_steps[0] == MeanNorm()
