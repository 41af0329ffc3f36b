"""STAR's rank rule and rescale: exact cases, and properties of every truncation."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.spectral import kept_rank, svd, truncate_and_rescale
from starmerge_models.spectral.svd import SVD
from tests.oracles import bounds, samples, star
from tests.oracles import deltas as oracle

etas = st.sampled_from([1e-6, 1.0, 20.0, 40.0, 60.0, 80.0, 99.0, 99.9, 100.0])
etas = etas | st.floats(0, 100, exclude_min=True)


def spectrum(*values):
    return torch.tensor(values, dtype=torch.float64)


def with_spectrum(*values):
    """An SVD of given singular values in standard bases."""
    identity = torch.eye(len(values), dtype=torch.float64)
    return SVD(identity, spectrum(*values), identity)


@pytest.mark.parametrize(
    ("values", "eta", "expected"),
    [
        ((4, 3, 2, 1), 1e-9, 1),
        ((4, 3, 2, 1), 39.9, 1),
        ((4, 3, 2, 1), 40, 1),
        ((4, 3, 2, 1), 40.1, 2),
        ((4, 3, 2, 1), 70, 2),
        ((4, 3, 2, 1), 70.1, 3),
        ((4, 3, 2, 1), 90, 3),
        ((4, 3, 2, 1), 90.1, 4),
        ((4, 3, 2, 1), 100, 4),
        ((4, 3, 2, 1, 0, 0), 100, 4),
        ((1, 1, 1, 1, 1), 40, 2),
        ((1, 1, 1, 1, 1), 41, 3),
        ((0.1,) * 10, 30, 3),
        ((0.1,) * 10, 70, 7),
        ((0.1,) * 10, 100, 10),
        ((5,), 1, 1),
        ((5,), 100, 1),
        ((0, 0, 0), 40, 0),
        ((0, 0, 0), 100, 0),
        ((), 40, 0),
        ((1e-300, 1e-300), 100, 2),
        ((1e-300, 1e-300), 50, 1),
        ((1e300, 1e-300), 100, 1),
        ((5e-324,), 40, 1),
        ((5e-324,), 100, 1),
    ],
)
def test_kept_rank(values, eta, expected):
    assert kept_rank(spectrum(*values), eta) == expected


@samples.SEARCH
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.integers(1, 100))
def test_kept_rank_is_the_smallest_that_suffices_in_exact_arithmetic(values, eta):
    values.sort(reverse=True)
    wanted = Fraction(eta, 100) * sum(values)
    if not sum(values):
        expected = 0
    else:
        expected = next(r for r in range(1, len(values) + 1) if sum(values[:r]) >= wanted)
    assert kept_rank(spectrum(*values), eta) == expected
    assert kept_rank(spectrum(*values) * 2.0**-40, eta) == expected


@samples.SEARCH
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.floats(0.001, 100))
def test_kept_rank_of_float32_values_matches_the_reference(values, eta):
    sigma = np.array(sorted(values, reverse=True), dtype=np.float64)
    admissible = star.admissible_ranks(sigma, eta, slack=2e-12)
    assert kept_rank(torch.tensor(sigma, dtype=torch.float32), eta) in admissible


@samples.SEARCH
@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=60), st.data())
def test_without_errors_no_share_is_too_close_to_call(values, data):
    S = spectrum(*sorted(values, reverse=True))
    reached = S.cumsum(0)
    r = data.draw(st.integers(1, len(values)))
    nearest = min(float(reached[r - 1] / reached[-1]) * 100 / (1 - 1e-12), 100.0)
    for eta in (np.nextafter(nearest, 0), nearest, min(np.nextafter(nearest, 200), 100.0)):
        _, report = truncate_and_rescale(with_spectrum(*S.tolist()), eta=float(eta))
        assert report.rank == kept_rank(S, float(eta))


@pytest.mark.parametrize("decay", [0.2846, 0.3329, 0.3785])
def test_eta_100_of_a_spectrum_that_fades_into_rounding(decay):
    S = torch.exp(-decay * torch.arange(110, dtype=torch.float64))
    _, report = truncate_and_rescale(with_spectrum(*S.tolist()), eta=100)
    assert report.rank in star.admissible_ranks(S.numpy(), 100, slack=2e-12)


def test_a_difference_above_rounding_is_no_tie():
    assert kept_rank(spectrum(4, 3, 2, 1), 40 * (1 + 1e-9)) == 2
    assert kept_rank(spectrum(4, 3, 2, 1), 40 * (1 - 1e-9)) == 1


def assert_is_truncation(delta, *, eta=40.0, rank=None):
    """The rank obeys the rule, the result is the reference's, the nuclear norm is restored."""
    kept, report = truncate_and_rescale(svd(delta), eta=eta, rank=rank)
    matrix, r = samples.exact(delta), report.rank
    sigma = oracle.singular_values(matrix)
    error, nuclear, k = bounds.spectrum(delta), float(np.sum(sigma)), len(sigma)
    assert isinstance(kept, LowRank)
    assert kept.rank == r
    assert kept.B.dtype == kept.A.dtype == torch.float64
    assert torch.isfinite(kept.to_dense()).all()
    if bounds.is_rounding(delta, sigma):
        assert oracle.frobenius(samples.values(kept)) <= bounds.truncation(delta, sigma, r)
        return
    if nuclear == 0.0:
        assert (r, report.factor) == (0, 1.0)
        assert not kept.to_dense().any()
        return
    true_rank = int(np.sum(sigma > 2 * error))
    if rank is not None:
        assert r == min(rank, true_rank)
    else:
        assert r in star.admissible_ranks(sigma, eta, slack=2 * k * error / nuclear + 2e-12)
        assert r <= true_rank
    assert report.nuclear_before == pytest.approx(nuclear, rel=1e-13, abs=k * error)
    assert report.nuclear_after == pytest.approx(report.nuclear_before, rel=1e-13)
    factor = nuclear / float(np.sum(sigma[:r]))
    assert report.factor == pytest.approx(factor, rel=1e-13 + 2 * k * error * factor / nuclear)
    tolerance = bounds.gamma(3, bounds.U32) * nuclear + k * error
    assert kept.nuclear() == pytest.approx(nuclear, rel=0, abs=tolerance)
    assume(bounds.gap(sigma, r) > 1e-4)
    difference = samples.values(kept) - star.truncated(matrix, r)
    assert oracle.frobenius(difference) <= bounds.truncation(delta, sigma, r)


@samples.SEARCH
@given(samples.any_deltas(), etas)
def test_truncation_by_eta(delta, eta):
    assert_is_truncation(delta, eta=eta)


@samples.SEARCH
@given(samples.any_deltas(), st.integers(1, 12))
def test_truncation_by_rank(delta, rank):
    assert_is_truncation(delta, rank=rank)


@samples.SEARCH
@given(samples.any_deltas(), etas)
def test_the_kept_rank_suffices_and_one_less_does_not(delta, eta):
    _, report = truncate_and_rescale(svd(delta), eta=eta)
    sigma = oracle.singular_values(samples.exact(delta))
    if bounds.is_rounding(delta, sigma) or not sigma.any():
        assert report.nuclear_after <= 4 * len(sigma) * bounds.spectrum(delta)
        return
    share = 100 * np.cumsum(sigma) / np.sum(sigma)
    slack = 200 * len(sigma) * bounds.spectrum(delta) / np.sum(sigma) + 1e-9
    assert share[report.rank - 1] >= eta - slack
    if report.rank > 1:
        assert share[report.rank - 2] < eta + slack


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_fixed_rank_overrules_eta(rank):
    kept, report = truncate_and_rescale(with_spectrum(4, 3, 2, 1), eta=100, rank=rank)
    assert report.rank == kept.rank == rank


@pytest.mark.parametrize(("rank", "expected"), [(2, 2), (3, 3), (4, 3), (100, 3)])
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_a_rank_above_the_true_rank_keeps_the_true_rank(kind, rank, expected):
    delta = samples.low_rank(9, 8, 3, seed=1, entries=samples.integers)
    if kind == "dense":
        delta = Dense(delta.to_dense())
    matrix = samples.exact(delta)
    sigma = oracle.singular_values(matrix)
    assert np.linalg.matrix_rank(matrix) == 3
    kept, report = truncate_and_rescale(svd(delta), eta=1, rank=rank)
    assert report.rank == kept.rank == expected
    difference = samples.values(kept) - star.truncated(matrix, expected)
    assert oracle.frobenius(difference) <= bounds.truncation(delta, sigma, expected)


def test_the_kept_values_keep_their_proportions():
    kept, report = truncate_and_rescale(with_spectrum(4, 3, 2, 1), eta=70)
    assert report.factor == pytest.approx(10 / 7, rel=1e-15)
    expected = np.diag(np.float32([40 / 7, 30 / 7, 0, 0]))
    np.testing.assert_array_equal(kept.to_dense().numpy(), expected)


def test_the_report_of_a_truncation():
    _, report = truncate_and_rescale(with_spectrum(4, 3, 2, 1), eta=40)
    assert report.rank == 1
    assert report.nuclear_before == 10.0
    assert report.nuclear_after == pytest.approx(10.0, rel=1e-15)
    assert report.factor == 2.5


@pytest.mark.parametrize("delta", [samples.low_rank(9, 7, 4), samples.dense(9, 7)])
def test_eta_100_gives_the_delta_back(delta):
    kept, report = truncate_and_rescale(svd(delta), eta=100)
    matrix = samples.exact(delta)
    sigma = oracle.singular_values(matrix)
    assert report.factor == 1.0
    assert report.rank == np.sum(sigma > 1e-10)
    difference = oracle.frobenius(samples.values(kept) - matrix)
    assert difference <= bounds.truncation(delta, sigma, report.rank)


@pytest.mark.parametrize("shape", [(4, 3), (0, 5), (3, 0), (5,), ()])
@pytest.mark.parametrize("rank", [None, 2])
def test_zero_and_empty_deltas_have_rank_zero(shape, rank):
    delta = Dense(torch.zeros(shape))
    kept, report = truncate_and_rescale(svd(delta), eta=40, rank=rank)
    assert (report.rank, report.nuclear_before, report.nuclear_after) == (0, 0.0, 0.0)
    assert report.factor == 1.0
    assert kept.to_dense().shape == delta.shape
    assert not kept.to_dense().any()


def test_more_energy_is_kept_the_larger_eta():
    spectrum = svd(samples.dense(20, 15))
    ranks = [truncate_and_rescale(spectrum, eta=eta)[1].rank for eta in range(1, 101)]
    assert ranks == sorted(ranks)
    assert (ranks[0], ranks[-1]) == (1, 15)
