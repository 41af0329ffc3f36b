"""Covariance merging against its float64 reference, and as the minimum that it is."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from starmerge_models.errors import UsageError
from starmerge_models.methods import Covariance, make_method
from starmerge_models.methods.covariance import mean_cosine, overlapping_side
from tests.oracles import covariance, samples, spectral
from tests.products import one_in

WEIGHTS = [1.0, 0.5, 2.0, 4.0]


def matrices(deltas):
    return [samples.exact(delta) for delta in deltas]


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "side", "ridge"),
    one_in(
        3,
        spectral.SHAPES,
        samples.KINDS,
        samples.DTYPES,
        ["input", "output", "auto"],
        [0.1, 0.01, 1.0],
    ),
)
def test_covariance_is_the_reference(shape, kind, dtype, side, ridge):
    m, n = shape
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    found = spectral.merged(Covariance(side=side, ridge=ridge), deltas)
    spectral.assert_close(found, covariance.covariance(matrices(deltas), side, ridge), deltas)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), spectral.SHAPES)
def test_without_a_ridge_it_is_the_pseudo_inverse(m, n, kind, side):
    deltas = samples.task_deltas(kind, m, n)
    found = spectral.merged(Covariance(side=side, ridge=0.0), deltas)
    expected = covariance.covariance(matrices(deltas), side, 0.0)
    spectral.assert_close(found, expected, deltas, condition=1e6)


@pytest.mark.parametrize("side", ["input", "output", "auto"])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_weights_are_those_of_the_objective(kind, side):
    deltas = samples.task_deltas(kind, 30, 20)
    for weights in (WEIGHTS, [1.0, 0.0, 2.0, 4.0]):
        found = spectral.merged(Covariance(side=side), deltas, weights)
        expected = covariance.covariance(matrices(deltas), side, weights=weights)
        spectral.assert_close(found, expected, deltas)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_a_common_factor_of_the_weights_cancels(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(Covariance(), deltas, [8.0 * w for w in WEIGHTS])
    expected = spectral.merged(Covariance(), deltas, WEIGHTS)
    spectral.assert_close(found, expected, deltas, times=2)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_no_other_update_has_less_of_the_objective(kind, side):
    deltas = samples.task_deltas(kind, 9, 7)
    tau = matrices(deltas) if side == "input" else [delta.T for delta in matrices(deltas)]
    C = [covariance.covariance_of(delta) for delta in tau]
    ridge = 0.1 * sum(map(np.trace, C)) / tau[0].shape[1]

    def objective(M):
        parts = [np.trace((M - t) @ c @ (M - t).T) for t, c in zip(tau, C, strict=True)]
        return sum(parts) + ridge * np.sum(M**2)

    M = spectral.merged(Covariance(side=side), deltas)
    M = M if side == "input" else M.T
    least = objective(M)
    for seed in range(5):
        step = samples.normal(*M.shape, seed=seed).double().numpy()
        assert objective(M + 1e-2 * step) > least
        assert objective(M - 1e-2 * step) > least


@samples.SEARCH
@given(samples.task_lists(), st.sampled_from(["input", "output"]))
def test_every_shape_rank_and_dtype(deltas, side):
    assume(all(np.any(tau) for tau in matrices(deltas)))
    found = spectral.merged(Covariance(side=side), deltas)
    expected = covariance.covariance(matrices(deltas), side)
    spectral.assert_close(found, expected, deltas, condition=1e5)


@samples.SEARCH
@given(samples.task_lists())
def test_auto_takes_the_side_of_the_larger_overlap(deltas):
    tau = [delta for delta in matrices(deltas) if np.any(delta)]
    assume(len(tau) > 1)
    outer, inner = covariance.overlap([delta.T for delta in tau]), covariance.overlap(tau)
    assume(abs(inner - outer) > 1e-9)
    side = "input" if inner > outer else "output"
    assert covariance.chosen_side(tau) == side
    expected = spectral.merged(Covariance(side=side), deltas)
    np.testing.assert_array_equal(spectral.merged(Covariance(), deltas), expected)


def test_adapters_of_one_A_overlap_on_the_input_side():
    shared = spectral.shared_A()
    turned = list(map(samples.transposed, shared))
    for deltas, side in ((shared, "input"), (turned, "output")):
        expected = spectral.merged(Covariance(side=side), deltas)
        np.testing.assert_array_equal(spectral.merged(Covariance(), deltas), expected)


def test_one_task_takes_the_input_side():
    delta = [samples.low_rank(30, 20, 3)]
    expected = spectral.merged(Covariance(side="input"), delta)
    np.testing.assert_array_equal(spectral.merged(Covariance(), delta), expected)
    expected = spectral.merged(Covariance(side="input"), [*delta, spectral.zero(30, 20)])
    np.testing.assert_array_equal(expected, spectral.merged(Covariance(), [*delta, None]))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_one_task_without_a_ridge_is_itself(kind, side):
    for delta in samples.task_deltas(kind, 30, 20):
        found = spectral.merged(Covariance(side=side, ridge=0.0), [delta])
        spectral.assert_close(found, samples.exact(delta), [delta], condition=1e6)


def test_a_ridge_shrinks_each_direction_of_one_task_by_its_energy():
    (delta,) = spectral.orthogonal_tasks(24, 18, 1, 3)
    sigma = np.array([1.0, 2.0, 3.0])
    c = sigma**2 / np.sum(sigma**2)
    for side, length in (("input", 18), ("output", 24)):
        found = spectral.merged(Covariance(side=side, ridge=0.3), [delta])
        values = np.linalg.svd(found, compute_uv=False)[:3]
        np.testing.assert_allclose(values[::-1], sigma * c / (c + 0.3 / length), rtol=1e-6)


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_equal_tasks_are_as_one(kind):
    delta = samples.task_deltas(kind, 30, 20)[2]
    expected = spectral.merged(Covariance(), [delta])
    found = spectral.merged(Covariance(side="input"), [delta] * 3)
    spectral.assert_close(found, expected, [delta] * 3, times=2)


@pytest.mark.parametrize("side", ["input", "output"])
def test_orthogonal_tasks_are_added_without_a_ridge(side):
    deltas = spectral.orthogonal_tasks()
    found = spectral.merged(Covariance(side=side, ridge=0.0), deltas)
    spectral.assert_close(found, sum(matrices(deltas)), deltas)


def test_the_size_of_a_task_does_not_change_its_say():
    first, second = samples.low_rank(30, 20, 3, seed=1), samples.low_rank(30, 20, 3, seed=2)
    found = spectral.merged(Covariance(side="input"), [first, second.scaled(1e-6)])
    expected = covariance.covariance(matrices([first, second.scaled(1e-6)]), "input")
    spectral.assert_close(found, expected, [first, second])
    # Alone, the first would lose less of itself.
    alone = spectral.merged(Covariance(side="input"), [first])
    assert np.linalg.norm(alone - found) > 0.01 * np.linalg.norm(alone)


@pytest.mark.parametrize("factor", [1e-15, 1e15])
def test_squares_neither_overflow_nor_vanish(factor):
    deltas = [delta.scaled(factor) for delta in samples.task_deltas("low-rank", 30, 20)]
    found = spectral.merged(Covariance(), deltas)
    spectral.assert_close(found, covariance.covariance(matrices(deltas)), deltas)


def test_negative_weights_are_refused():
    with pytest.raises(UsageError, match=r"covariance: a weight is negative.*from 0 up"):
        spectral.merge(Covariance(), samples.task_deltas("low-rank"), [1.0, 1.0, -0.5, 1.0])


@pytest.mark.parametrize("parameters", [{"ridge": -0.1}, {"side": "both"}])
def test_parameters_out_of_range_are_refused(parameters):
    with pytest.raises(UsageError, match=next(iter(parameters))):
        make_method("covariance", parameters)


@pytest.mark.parametrize(("m", "n"), [(12, 5), (5, 12), (8, 8)])
def test_the_mean_cosine_is_that_of_all_pairs(m, n):
    unit = [samples.normal(m, n, seed=seed, dtype=torch.float64) for seed in range(5)]
    unit = [tau / torch.linalg.vector_norm(tau) for tau in unit]
    C = [(tau.T @ tau).numpy() for tau in unit]
    cosines = [
        np.sum(C[s] * C[t]) / (np.linalg.norm(C[s]) * np.linalg.norm(C[t]))
        for s in range(5)
        for t in range(s)
    ]
    assert mean_cosine(unit) == pytest.approx(np.mean(cosines), rel=1e-12)
    assert mean_cosine(unit[:1]) == 0.0


def test_the_order_of_tasks_without_overlap_does_not_choose_the_side():
    for seed in range(12):
        U, V = samples.orthogonal(12, seed=seed), samples.orthogonal(10, seed=seed + 50)
        tau = [
            torch.from_numpy(U[:, 3 * t : 3 * t + 3] @ V[:, 3 * t : 3 * t + 3].T) for t in range(3)
        ]
        assert overlapping_side(tau) == overlapping_side(tau[::-1]) == "input"
