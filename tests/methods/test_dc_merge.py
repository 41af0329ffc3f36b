"""DC-Merge against its float64 reference, and what balancing and covering mean."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from starmerge_models.deltas import LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import DcMerge, make_method
from tests.oracles import dc_merge, samples, spectral, tsv_m

WEIGHTS = [1.0, 0.5, -2.0, 4.0]
"""Powers of two: float32 holds the weighted deltas."""


def matrices(deltas, weights=None):
    weights = weights or [1.0] * len(deltas)
    return [w * samples.exact(delta) for w, delta in zip(weights, deltas, strict=True)]


def spectrum(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"smoothing": "linear", "k": 10},
        {"smoothing": "linear", "rho": 1.5, "triplets": 2},
        {"smoothing": "none", "triplets": "share", "k": 40},
        {"smoothing": "average", "triplets": "share", "k": 2.5},
    ],
)
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), spectral.SHAPES)
def test_dc_merge_is_the_reference(m, n, kind, dtype, parameters):
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    found = spectral.merged(DcMerge(alpha=0.7, **parameters), deltas)
    expected = dc_merge.dc_merge(matrices(deltas), 0.7, **parameters)
    spectral.assert_close(found, expected, deltas)


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("smoothing", ["average", "linear", "none"])
def test_weights_multiply_the_task_vectors_and_divide_the_means(kind, smoothing):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(DcMerge(smoothing=smoothing, k=20), deltas, WEIGHTS)
    expected = dc_merge.dc_merge(
        matrices(deltas, WEIGHTS), smoothing=smoothing, k=20, weights=WEIGHTS
    )
    spectral.assert_close(found, expected, deltas, times=4)


@samples.SEARCH
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.1, 30, 100]))
def test_every_number_of_tasks_and_rank(seed, tasks, r, k):
    deltas = [samples.low_rank(20, 18, r, seed=10 * seed + t) for t in range(tasks)]
    values = np.concatenate([spectrum(tau)[:r] for tau in matrices(deltas)])
    assume(values.min() > 1e-2 * values.max())
    found = spectral.merged(DcMerge(k=k, smoothing="linear"), deltas)
    expected = dc_merge.dc_merge(matrices(deltas), k=k, smoothing="linear")
    spectral.assert_close(found, expected, deltas, condition=1e6)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_one_task_is_itself_but_for_its_balance(kind):
    for delta in samples.task_deltas(kind, 30, 20):
        tau = samples.exact(delta)
        sigma = spectrum(tau)
        r = np.linalg.matrix_rank(tau)
        spectral.assert_close(spectral.merged(DcMerge(smoothing="none"), [delta]), tau, [delta])
        even = spectrum(spectral.merged(DcMerge(), [delta]))
        np.testing.assert_allclose(even[:r], sigma.sum() / r, rtol=1e-6)
        falling = spectrum(spectral.merged(DcMerge(smoothing="linear", rho=3.0), [delta]))
        assert falling[:r].sum() == pytest.approx(sigma.sum(), rel=1e-6)
        assert falling[0] / falling[r - 1] == pytest.approx(min(3.0, sigma[0] / sigma[r - 1]))
        if r > 2:
            np.testing.assert_allclose(np.diff(falling[:r], 2), 0, atol=1e-5 * falling[0])


@pytest.mark.parametrize("k", [0.1, 30, 100])
def test_orthogonal_tasks_are_added_however_much_is_trimmed(k):
    deltas = spectral.orthogonal_tasks()
    for smoothing in ("none", "average"):
        found = spectral.merged(DcMerge(smoothing=smoothing, k=k), deltas)
        alone = [spectral.merged(DcMerge(smoothing=smoothing), [delta]) for delta in deltas]
        spectral.assert_close(found, sum(alone), deltas, times=2)


def test_the_mean_is_of_the_tasks_that_agree():
    # The polar factor of [u u] is [u u]/sqrt(2): M_1 is 1 everywhere and M_2 3, or -3 where it is
    # against the other. The mean on the diagonal is 2, or -3, and each block gives half of it.
    u, v = torch.eye(5)[:, [1]], torch.eye(4)[[2]]
    both = spectral.merged(DcMerge(), [LowRank(u, v, 2.0), LowRank(u, v, 6.0)])
    against = spectral.merged(DcMerge(), [LowRank(u, v, 2.0), LowRank(u, v, -6.0)])
    assert both[1, 2] == pytest.approx(2.0)
    assert against[1, 2] == pytest.approx(-3.0)


@pytest.mark.parametrize(("m", "n"), [(40, 36), (36, 40)])
def test_the_result_lies_in_the_spaces_of_the_tasks(m, n):
    deltas = samples.task_deltas("low-rank", m, n)
    found = spectral.merged(DcMerge(), deltas)
    left = tsv_m.polar(np.hstack([samples.exact(delta) for delta in deltas]))
    assert np.linalg.norm(found - left @ (left.T @ found)) <= 1e-5 * np.linalg.norm(found)
    assert spectral.merge(DcMerge(), deltas).rank == 16


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("smoothing", "cubic"),
        ("rho", 0.5),
        ("k", 0),
        ("k", 101),
        ("triplets", 0),
        ("triplets", "most"),
    ],
)
def test_parameters_out_of_range_are_refused(key, value):
    with pytest.raises(UsageError, match=key):
        make_method("dc_merge", {key: value})
