"""Whitened inputs: the change of basis and back, and every method that works in it."""

import numpy as np
import pytest
import torch

from starmerge_models.deltas import Dense, LowRank, Stored
from starmerge_models.methods import METHODS, Ctm, IsoCts, Shares, Star, make_method, make_pipeline
from starmerge_models.methods.kinds.spectral import CoreSpaceMerge
from starmerge_models.spectral.metric import RIDGE, Whitening
from starmerge_models.spectral.moment import Moment
from tests.merge_one import merge_one
from tests.oracles import bounds, metric, own_response, samples, spectral
from tests.products import one_in

SIDES = ["columns", "rows"]
WHITENED = sorted(name for name, found in METHODS.items() if found.uses_metric)
MERGES = [name for name in WHITENED if name != "star"]


def length(m, n, side):
    """Of an input of a weight stored as (m, n)."""
    return n if side == "columns" else m


def matrices(deltas):
    return [samples.exact(delta) for delta in deltas]


def test_all_spectral_merges_but_ace_work_in_whitened_inputs():
    merges = {name for name, found in METHODS.items() if issubclass(found, CoreSpaceMerge)}
    assert merges - set(WHITENED) == {"ace"}
    assert set(WHITENED) - merges == {"star"}


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("ridge", [RIDGE, 1e-2])
def test_whitened_inputs_have_the_unit_matrix_for_second_moment(k, ridge):
    root = metric.one_root(8, k, 0)
    L = Whitening.of(Moment(root, 9), "columns", ridge).L.numpy()
    sigma = metric.ridged(metric.sigma_of(root), ridge)
    np.testing.assert_allclose(L @ L.T, sigma, rtol=0, atol=1e-14 * np.trace(sigma))
    assert np.array_equal(L, np.tril(L))


def test_inputs_that_are_all_zero_say_nothing():
    whitening = Whitening.of(Moment(torch.zeros(1, 5), 3), "columns")
    assert torch.equal(whitening.L, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_a_delta_goes_and_comes_back(kind, side):
    m, n = 12, 9
    inputs, sigma = metric.inputs_of(length(m, n, side), side=side)
    ridged = metric.ridged(sigma)
    for delta in samples.task_deltas(kind, m, n):
        tau = samples.exact(delta)
        whitened = inputs.whitening.whiten(delta)
        restored = inputs.whitening.restore(whitened)
        for found in (whitened, restored):
            assert type(found) is type(delta)
        size = np.linalg.norm(tau)
        np.testing.assert_allclose(samples.exact(restored), tau, rtol=0, atol=1e-13 * size)
        # The size of what is whitened is that of the outputs.
        products = tau @ ridged @ tau.T if side == "columns" else tau.T @ ridged @ tau
        energy = np.sum(samples.exact(whitened) ** 2)
        assert energy == pytest.approx(np.trace(products), rel=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_rounding_the_factors_of_a_restored_delta_loses_no_more_than_rounding_itself(side):
    n = 60
    inputs, _ = metric.inputs_of(n, k=1, side=side)  # one direction has all but the ridge
    shape = (20, n) if side == "columns" else (n, 20)
    (delta,) = samples.task_deltas("low-rank", *shape)[2:3]
    restored = inputs.whitening.restore(inputs.whitening.whiten(delta))
    rounded = LowRank(restored.B.float(), restored.A.float(), restored.scale)
    tau = samples.exact(delta)
    error = np.linalg.norm(samples.exact(rounded) - tau)
    assert error <= bounds.U32 * 2 * np.sqrt(8) * np.linalg.norm(tau)


def oracle(method, deltas, sigma, side, **context):
    """The same method in the coordinates that the symmetric root whitens, in float64."""

    def merge(whitened):
        exact = [Dense(torch.from_numpy(tau.copy())) for tau in whitened]
        return samples.exact(merge_one(method, exact, **context).delta)

    return metric.in_whitened_inputs(merge, matrices(deltas), sigma, side)


def assert_close(found, expected, deltas, sigma):
    """Rounding of what is stored, and that of the reference, which the restoring multiplies."""
    values = np.linalg.eigvalsh(metric.ridged(sigma))
    condition = float(np.sqrt(values[-1] / values[0]))
    spectral.assert_close(found, expected, deltas, times=2 * condition)


@pytest.mark.parametrize(
    ("shape", "name", "kind", "side"),
    one_in(2, [(9, 7), (30, 20), (12, 40), (40, 12)], [*MERGES, "star"], samples.KINDS, SIDES),
)
def test_every_method_merges_as_with_the_symmetric_root(shape, name, kind, side):
    m, n = shape
    deltas = samples.task_deltas(kind, m, n)
    inputs, sigma = metric.inputs_of(length(m, n, side), side=side)
    weights = (1.0, 0.5, 2.0, 1.0)
    method = make_method(name)
    found = samples.exact(merge_one(method, deltas, weights=weights, inputs=inputs).delta)
    expected = oracle(method, deltas, sigma, side, weights=weights)
    assert_close(found, expected, deltas, sigma)
    plain = samples.exact(merge_one(method, deltas, weights=weights).delta)
    assert np.linalg.norm(found - plain) > 1e-3 * np.linalg.norm(plain)


def test_a_response_is_measured_in_the_weights_own_coordinates():
    deltas = samples.task_deltas("low-rank", 30, 20)
    inputs, _ = metric.inputs_of(20)
    found = samples.exact(merge_one(Shares(response=0.6), deltas, inputs=inputs).delta)
    tau = [{"weight": delta} for delta in matrices(deltas)]
    assert own_response.mean_response(tau, {"weight": found}) == pytest.approx(0.6, rel=1e-6)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("name", WHITENED)
def test_white_inputs_change_nothing(name, kind, side):
    m, n = 30, 20
    deltas = samples.task_deltas(kind, m, n)
    inputs = metric.identity(length(m, n, side), side)
    found = samples.exact(merge_one(name, deltas, inputs=inputs).delta)
    spectral.assert_close(found, samples.exact(merge_one(name, deltas).delta), deltas, times=4)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", WHITENED)
def test_factors_and_matrices_give_the_same(name, side):
    m, n = 30, 20
    deltas = samples.task_deltas("low-rank", m, n)
    inputs, sigma = metric.inputs_of(length(m, n, side), side=side)
    found = merge_one(name, deltas, inputs=inputs).delta
    assert isinstance(found, LowRank)
    expected = merge_one(name, spectral.as_dense(deltas), inputs=inputs).delta
    if name != "ctm":  # of low rank by construction
        assert isinstance(expected, Dense)
    assert_close(samples.exact(found), samples.exact(expected), deltas, sigma)


@pytest.mark.parametrize("chain", ["star+average", "star+tsv_m", "iso_c+own_response", "tsv_m+svc"])
def test_steps_that_know_no_metric_see_the_weights_own_coordinates(chain):
    deltas = samples.task_deltas("low-rank", 30, 20)
    inputs, sigma = metric.inputs_of(20)
    found = samples.exact(merge_one(chain, deltas, inputs=inputs).delta)
    first, _, second = chain.partition("+")
    if first == "star":
        transformed = [merge_one(Star(), [delta], inputs=inputs).delta for delta in deltas]
        expected = samples.exact(merge_one(second, transformed, inputs=inputs).delta)
    else:
        merged = oracle(make_method(first), deltas, sigma, "columns")
        # A post-step on what was merged: its survey and its result.
        step = make_pipeline(f"average+{second}").post_steps[0]
        tensor = spectral.context(deltas)
        delta = Dense(torch.from_numpy(merged))
        survey = step.survey(lambda look: iter([look(delta, spectral.given(deltas), tensor)]))
        expected = samples.exact(step.apply(delta, spectral.given(deltas), tensor, survey))
    assert_close(found, expected, deltas, sigma)


def test_the_truncation_says_what_was_kept_in_whitened_inputs():
    deltas = samples.task_deltas("low-rank", 30, 20)
    inputs, sigma = metric.inputs_of(20)
    root, _ = metric.symmetric_roots(sigma)
    told = merge_one(Star(), deltas, inputs=inputs).truncations
    for delta, truncation in zip(deltas, told, strict=True):
        values = np.linalg.svd(samples.exact(delta) @ root, compute_uv=False)
        assert truncation.nuclear_before == pytest.approx(values.sum(), rel=1e-9)
        share = np.cumsum(values) / values.sum()
        assert truncation.rank == int(np.argmax(share >= 0.4)) + 1


def test_the_noise_of_a_stored_finetune_is_dropped_before_its_inputs_are_whitened():
    base = samples.normal(60, 50, seed=1).bfloat16()
    update = samples.low_rank(60, 50, 3, seed=2, scale=0.05).to_dense()
    delta = Stored([(1.0, (base.float() + update).bfloat16())], base)
    inputs, _ = metric.inputs_of(50)
    found = merge_one(Star(eta=99.5), [delta], base=base, inputs=inputs)
    noise = found.truncations[0].noise
    assert noise.applies
    assert noise.above == 3
    assert found.truncations[0].rank <= 3
    expected = merge_one(
        make_pipeline("denoise+star", {"eta": 99.5}), [delta], base=base, inputs=inputs
    )
    np.testing.assert_array_equal(samples.exact(found.delta), samples.exact(expected.delta))
    left = merge_one(Star(eta=99.5, noise_floor="off"), [delta], base=base, inputs=inputs)
    assert left.truncations[0].noise is None
    assert left.truncations[0].rank > 3


@pytest.mark.parametrize("name", ["average", "ties", "denoise", "ace", "knots", "wudi"])
def test_other_methods_do_not_look_at_the_inputs(name):
    deltas = samples.task_deltas("dense", 12, 9)
    inputs, _ = metric.inputs_of(9)
    found = samples.exact(merge_one(name, deltas, inputs=inputs).delta)
    np.testing.assert_array_equal(found, samples.exact(merge_one(name, deltas).delta))


@pytest.mark.parametrize("name", WHITENED)
def test_averaged_embeddings_stay_in_their_own_coordinates(name):
    deltas = samples.task_deltas("dense", 12, 9)
    inputs, _ = metric.inputs_of(9)
    found = merge_one(name, deltas, is_embedding=True, inputs=inputs).delta
    plain = merge_one(name, deltas, is_embedding=True).delta
    np.testing.assert_array_equal(samples.exact(found), samples.exact(plain))


@pytest.mark.parametrize("method", [IsoCts(), Ctm(rank=3)], ids=repr)
def test_zeros_stay_zero(method):
    inputs, _ = metric.inputs_of(5)
    for zero in (Dense(torch.zeros(6, 5)), LowRank(torch.zeros(6, 2), torch.ones(2, 5))):
        assert not samples.exact(merge_one(method, [zero] * 2, inputs=inputs).delta).any()
