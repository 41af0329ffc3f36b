"""CtM against its float64 reference, and what a merge in common bases of rank r means."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import Ctm, make_method
from tests.oracles import ctm, samples, spectral
from tests.products import one_in

WEIGHTS = [1.0, 0.5, -2.0, 4.0]
"""Powers of two: float32 holds the weighted deltas."""


def matrices(deltas, weights=None):
    weights = weights or [1.0] * len(deltas)
    return [w * samples.exact(delta) for w, delta in zip(weights, deltas, strict=True)]


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "parameters"),
    one_in(
        3,
        spectral.SHAPES,
        samples.KINDS,
        samples.DTYPES,
        [
            {},
            {"rank": 3},
            {"rank": 5, "beta": 1.0, "k": 60},
            {"rank": 2, "rule": "sum", "beta": 0.0},
        ],
    ),
)
def test_ctm_is_the_reference(shape, kind, dtype, parameters):
    m, n = shape
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    found = spectral.merged(Ctm(lambda_=0.7, **parameters), deltas)
    expected = ctm.ctm(matrices(deltas), lam=0.7, **parameters)
    spectral.assert_close(found, expected, deltas)


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("rule", ["ties", "sum", "mean"])
def test_weights_multiply_the_task_vectors_and_divide_the_means(kind, rule):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(Ctm(rank=4, rule=rule), deltas, WEIGHTS)
    expected = ctm.ctm(matrices(deltas, WEIGHTS), 4, rule=rule, weights=WEIGHTS)
    spectral.assert_close(found, expected, deltas, times=4)


@samples.SEARCH
@given(
    st.integers(0, 1000),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 6),
    st.floats(0, 1),
)
def test_a_sum_is_the_projected_sum_whatever_the_shape(seed, tasks, r, rank, beta):
    deltas = [samples.low_rank(15, 12, r, seed=10 * seed + t) for t in range(tasks)]
    found = spectral.merged(Ctm(rank=rank, rule="sum", beta=beta), deltas)
    X, summed = ctm.rescaled(matrices(deltas), beta), sum(matrices(deltas))
    # Of two orthogonal tasks of one norm the iteration begins at a saddle, which it leaves in a
    # direction that rounding decides: then the reference does not agree with itself.
    noise = np.random.default_rng(0).standard_normal(X.shape)
    expected, other = (_projected(summed, Y, rank) for Y in (X, X * (1 + 1e-12 * noise)))
    assume(np.linalg.norm(expected - other) <= 1e-6 * np.linalg.norm(summed))
    spectral.assert_close(found, expected, deltas, condition=1e7)


def _projected(summed, X, rank):
    U, V, _ = ctm.tucker2(X, rank)
    return U @ U.T @ summed @ V @ V.T


@pytest.mark.parametrize("rank", [1, 3, 8, 100])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_update_has_rank_r_by_construction(kind, rank):
    deltas = samples.task_deltas(kind, 30, 20)
    merged = spectral.merge(Ctm(rank=rank), deltas)
    assert np.linalg.matrix_rank(samples.exact(merged)) <= rank
    bound = min(rank, 16 if kind == "low-rank" else 20)
    assert merged.rank == bound
    assert isinstance(merged, LowRank if bound < 20 else Dense)


def test_without_a_rank_it_is_the_largest_of_the_tasks():
    deltas = samples.task_deltas("low-rank", 30, 20)
    assert spectral.merge(Ctm(), deltas).rank == 8
    assert spectral.merge(Ctm(), deltas[:2]).rank == 3
    # Factors wider than the rank of what they make do not count.
    assert spectral.merge(Ctm(), spectral.parallel_columns()).rank == 1


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("rule", ["sum", "mean", "ties"])
def test_bases_of_the_whole_space_lose_nothing(kind, rule):
    deltas = samples.task_deltas(kind, 9, 7)
    if rule == "ties":
        deltas = deltas[:1]
    found = spectral.merged(Ctm(rank=50, rule=rule, k=100), deltas)
    expected = sum(matrices(deltas)) / (len(deltas) if rule == "mean" else 1)
    spectral.assert_close(found, expected, deltas, times=2)


def test_one_task_is_its_truncation():
    for delta in samples.task_deltas("low-rank", 30, 20):
        U, sigma, Vt = np.linalg.svd(samples.exact(delta), full_matrices=False)
        found = spectral.merged(Ctm(rank=2, k=50), [delta])
        spectral.assert_close(found, (U[:, :2] * sigma[:2]) @ Vt[:2], [delta])


def test_small_tasks_have_a_say_in_the_bases_unless_beta_is_one():
    large, small = spectral.orthogonal_tasks(tasks=2, r=2)
    small = small.scaled(1e-3)
    tau = samples.exact(small)

    def kept(beta):
        found = spectral.merged(Ctm(rank=2, beta=beta, rule="sum"), [large, small])
        return np.sum(found * tau) / np.sum(tau * tau)

    assert kept(1.0) == pytest.approx(0.0, abs=1e-6)
    assert kept(0.0) > 0.5


def test_orthogonal_tasks_are_added_where_there_is_room():
    deltas = spectral.orthogonal_tasks()
    expected = sum(matrices(deltas))
    spectral.assert_close(spectral.merged(Ctm(rank=6, k=20), deltas), expected, deltas)


@pytest.mark.parametrize(
    ("key", "value"), [("rank", 0), ("beta", -0.1), ("beta", 1.1), ("rule", "dare"), ("k", 0)]
)
def test_parameters_out_of_range_are_refused(key, value):
    with pytest.raises(UsageError, match=key):
        make_method("ctm", {key: value})
