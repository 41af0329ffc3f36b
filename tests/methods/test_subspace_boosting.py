"""Subspace Boosting against its float64 reference, and the spectra that it makes."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.merging.in_memory import merge_state
from starmerge_models.methods import (
    Pipeline,
    SubspaceBoosting,
    TaskArithmetic,
    make_method,
    make_pipeline,
)
from tests.oracles import own_response, samples, spectra, spectral, subspace_boosting
from tests.products import one_in

MERGES = ["task_arithmetic", "average", "ties", "tsv_m"]
BETAS = [0.01, 0.3, 0.7, 1.0]


def spectrum(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


def boosted(merged, beta, deltas=(), **given):
    """Apply the step to an update, so that the reference sees the stored one too."""
    deltas = list(deltas) or [merged]
    context = spectral.context(deltas, **given)
    return SubspaceBoosting(beta=beta).apply(merged, spectral.given(deltas), context, None)


def assert_is_boosted(merged, beta, deltas=(), condition=1e5):
    found = samples.exact(boosted(merged, beta, deltas))
    expected = subspace_boosting.subspace_boosting(samples.exact(merged), beta)
    # The result may be larger than the update: its own size is what is rounded.
    spectral.assert_close(found, expected, [merged, *deltas], condition=condition)


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "beta", "merge"),
    one_in(4, spectral.SHAPES, samples.KINDS, samples.DTYPES, BETAS, MERGES),
)
def test_it_is_the_reference(shape, kind, dtype, beta, merge):
    m, n = shape
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    assert_is_boosted(spectral.merge(merge, deltas), beta, deltas)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_it_is_a_step_of_a_chain(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    chain = make_pipeline("task_arithmetic+subspace_boosting", {"alpha": 1, "beta": 0.4})
    assert chain == Pipeline.of([TaskArithmetic(alpha=1.0), SubspaceBoosting(beta=0.4)])
    expected = boosted(spectral.merge(TaskArithmetic(alpha=1.0), deltas), 0.4)
    np.testing.assert_array_equal(spectral.merged(chain, deltas), samples.exact(expected))


@samples.SEARCH
@given(samples.task_lists(), st.sampled_from(BETAS))
def test_every_shape_rank_and_dtype(deltas, beta):
    merged = spectral.merge(TaskArithmetic(alpha=1.0), deltas)
    matrix = samples.exact(merged)
    size, sigma = np.linalg.norm(matrix), spectrum(matrix)
    # What cancels leaves rounding; every direction is there or not, and the cut is plain.
    assume(size > 1e-2 * sum(np.linalg.norm(samples.exact(delta)) for delta in deltas) > 0)
    assume(not np.any((sigma > 1e-9 * size) & (sigma < 1e-3 * size)))
    assume(np.min(np.abs(np.cumsum(sigma)[:-1] / sigma.sum() - beta), initial=1.0) > 1e-6)
    assert_is_boosted(merged, beta, deltas, condition=1e7)


@pytest.mark.parametrize("stored", ["factors", "matrix"])
def test_the_spectrum_is_lifted_to_the_value_of_the_cut(stored):
    sigma = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])
    matrix = torch.from_numpy(spectra.with_spectrum(sigma, 12, 9))
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    merged = LowRank(U[:, :6] * S[:6], Vh[:6]) if stored == "factors" else Dense(matrix)
    # 8 are 51 % of the sum, 12 are 76 %, 14 are 89 %.
    for beta, least in ((0.01, 8.0), (0.5, 8.0), (0.6, 4.0), (0.8, 2.0), (1.0, 0.25)):
        found = spectrum(samples.exact(boosted(merged, beta)))
        np.testing.assert_allclose(found[:6], np.maximum(sigma, least), rtol=1e-6)
        np.testing.assert_allclose(found[6:], 0.0, atol=1e-5)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_more_of_beta_lifts_less_and_none_is_lowered(kind):
    merged = spectral.merge("task_arithmetic", samples.task_deltas(kind, 30, 20))
    before = spectrum(samples.exact(merged))
    spectrums = [spectrum(samples.exact(boosted(merged, beta))) for beta in sorted(BETAS)]
    for more, less in zip(spectrums, [*spectrums[1:], before], strict=True):
        assert np.all(more >= less - 1e-6 * before[0])
    assert spectrums[0].sum() > 1.1 * before.sum()


@pytest.mark.parametrize("kind", samples.KINDS)
def test_all_of_beta_leaves_the_update_as_it_is(kind):
    merged = spectral.merge("task_arithmetic", samples.task_deltas(kind, 30, 20))
    assert boosted(merged, 1.0) is merged


def test_what_is_low_rank_stays_so_and_gets_no_new_directions():
    merged = spectral.merge("task_arithmetic", samples.task_deltas("low-rank", 30, 20))
    found = boosted(merged, 0.01)
    assert isinstance(found, LowRank)
    assert found.rank == 16


@pytest.mark.parametrize("stored", [None, torch.float64, torch.float32])
def test_rounding_is_no_direction(stored):
    # One A for all tasks, and factors that are nearly parallel as float32 rounds their scales.
    delta = samples.low_rank(24, 18, 3)
    for deltas in (spectral.shared_A(), [delta.scaled(factor) for factor in (0.3, 0.7, 1.1)]):
        given = deltas if stored is None else spectral.as_dense(deltas, stored)
        values = spectrum(spectral.merged("task_arithmetic+subspace_boosting", given))
        np.testing.assert_allclose(values[:3], values[0], rtol=1e-5)
        assert values[3] <= 1e-6 * values[0]


@pytest.mark.parametrize("kind", samples.KINDS)
def test_rotations_and_scale_carry_over(kind):
    m, n = 14, 11
    merged = spectral.merge("task_arithmetic", samples.task_deltas(kind, m, n))
    expected = samples.exact(boosted(merged, 0.5))
    left, right = samples.orthogonal(m, seed=1), samples.orthogonal(n, seed=2)
    turned = samples.exact(boosted(samples.rotated(merged, left, right), 0.5))
    spectral.assert_close(turned, left @ expected @ right, [merged], times=2, condition=1e6)
    scaled = samples.exact(boosted(merged.scaled(-8.0), 0.5)) / -8.0
    spectral.assert_close(scaled, expected, [merged], times=2, condition=1e6)


def test_own_response_after_it_sets_the_scale():
    deltas = samples.task_deltas("low-rank", 30, 20)
    found = spectral.merged("task_arithmetic+subspace_boosting+own_response", deltas)
    tau = [{"w": samples.exact(delta)} for delta in deltas]
    mean = own_response.mean_response(tau, {"w": found})
    assert mean == pytest.approx(len(deltas) ** (-1 / 8), rel=1e-6)


@pytest.mark.parametrize(
    "zeros",
    [
        [LowRank(torch.zeros(6, 2), torch.ones(2, 5))] * 2,
        [Dense(torch.zeros(6, 5))] * 3,
        [Dense(torch.zeros(6, 0))] * 2,
    ],
)
def test_zeros_stay_zero(zeros):
    assert not spectral.merged("task_arithmetic+subspace_boosting", zeros).any()


def test_vectors_and_embeddings_are_left_as_they_are():
    vectors = [{"bias": samples.dense(5, seed=t)} for t in range(3)]
    expected = merge_state(vectors, "task_arithmetic")["bias"]
    found = merge_state(vectors, "task_arithmetic+subspace_boosting")["bias"]
    assert torch.equal(found.tensor, expected.tensor)
    merged = spectral.merge("task_arithmetic", samples.task_deltas("dense"))
    assert boosted(merged, 0.01, is_embedding=True) is merged
    factored = spectral.merge("task_arithmetic", samples.task_deltas("low-rank", 30, 20))
    found = samples.exact(boosted(factored, 0.01, is_embedding=True))
    np.testing.assert_array_equal(found, samples.exact(boosted(factored, 0.01)))


@pytest.mark.parametrize("merge", ["iso_c", "iso_cts"])
def test_flat_spectra_are_refused(merge):
    with pytest.raises(UsageError, match=f"subspace_boosting: all singular values of what {merge}"):
        make_pipeline(f"{merge}+subspace_boosting")


@pytest.mark.parametrize("between", ["", "+scale", "+own_response"])
def test_svc_after_it_is_refused(between):
    with pytest.raises(UsageError, match="svc: subspace_boosting made small singular values equal"):
        make_pipeline(f"task_arithmetic+subspace_boosting{between}+svc")
    make_pipeline("task_arithmetic+svc+subspace_boosting")


@pytest.mark.parametrize("beta", [0, -0.1, 1.1, "most"])
def test_a_share_out_of_range_is_refused(beta):
    with pytest.raises(UsageError, match="beta"):
        make_method("subspace_boosting", {"beta": beta})
