"""The SVD of low-rank deltas in factor space, against numpy's SVD of the product."""

import numpy as np
import pytest
import torch
from hypothesis import given

from starmerge_models.deltas import Dense, LowRank, total
from starmerge_models.spectral import svd, svd_dense, svd_factored
from tests.oracles import bounds, samples
from tests.oracles import deltas as oracle


@pytest.fixture
def threads():
    """Set torch's number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def all_triplets(delta):
    """The whole SVD."""
    found = svd_factored(delta)
    return found.first(len(found.S))


def assert_is_svd(delta):
    """The factors are float64, orthonormal, of numpy's singular values, and give the delta."""
    found = all_triplets(delta)
    assert found.U.dtype == found.S.dtype == found.V.dtype == torch.float64
    U, S, V = found.U.numpy(), found.S.numpy(), found.V.numpy()
    matrix, bound = samples.exact(delta), bounds.spectrum(delta)
    k = len(S)
    assert k <= min(delta.rank, *delta.shape)
    assert (U.shape, V.shape) == ((matrix.shape[0], k), (matrix.shape[1], k))
    assert np.all(S >= 0)
    assert np.all(np.diff(S) <= 0)
    expected = oracle.singular_values(matrix)
    np.testing.assert_allclose(S, expected[:k], rtol=0, atol=bound)
    assert np.all(expected[k:] <= bound)
    assert oracle.frobenius((U * S) @ V.T - matrix) <= np.sqrt(delta.rank) * bound
    for basis in (U, V):
        np.testing.assert_allclose(
            basis.T @ basis, np.eye(k), rtol=0, atol=bounds.orthonormality(delta)
        )


@samples.SEARCH
@given(samples.low_rank_deltas())
def test_every_shape_rank_scale_and_dtype(delta):
    assert_is_svd(delta)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6, 12])
@pytest.mark.parametrize(("m", "n"), [(30, 7), (7, 30), (1, 20), (20, 1), (9, 9)])
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_ranks_below_and_above_the_shorter_side(dtype, m, n, rank):
    delta = samples.low_rank(m, n, rank, seed=rank, dtype=dtype, scale=-0.3)
    assert_is_svd(delta)
    assert len(svd(delta).S) == min(m, n, rank)


@pytest.mark.parametrize("scale", samples.SCALES)
def test_scales(scale):
    assert_is_svd(samples.low_rank(9, 7, 4, scale=scale))


def test_agrees_with_the_dense_kernel():
    delta = samples.low_rank(12, 9, 4, dtype=torch.float64)
    whole = svd_dense(Dense(delta.scale * delta.B @ delta.A))
    factored = all_triplets(delta)
    bound = 2 * bounds.spectrum(delta)
    np.testing.assert_allclose(factored.S, whole.S[:4], rtol=0, atol=bound)
    assert float(whole.S[4:].max()) <= bound
    cosines = torch.linalg.svdvals(factored.U.T @ whole.U[:, :4])
    np.testing.assert_allclose(cosines, np.ones(4), rtol=0, atol=1e-12)


def test_a_negative_scale_changes_signs_of_vectors_and_nothing_else():
    plus, minus = (all_triplets(samples.low_rank(8, 6, 3, scale=scale)) for scale in (2.0, -2.0))
    np.testing.assert_allclose(minus.S, plus.S, rtol=1e-14)
    left = ((minus.U * minus.S) @ minus.V.T).numpy()
    right = ((plus.U * plus.S) @ plus.V.T).numpy()
    np.testing.assert_allclose(left, -right, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [*samples.DTYPES, torch.float64])
def test_a_zero_delta_has_no_triplets(dtype):
    B, A = torch.zeros(5, 3, dtype=dtype), samples.normal(3, 4, seed=1, dtype=dtype)
    for delta in (LowRank(B, A), LowRank(A.T, B.T), LowRank(B, torch.zeros_like(A))):
        found = all_triplets(delta)
        assert found.S.shape == (0,)
        assert found.U.shape == (delta.shape[0], 0)
        assert found.V.shape == (delta.shape[1], 0)


@pytest.mark.parametrize(("m", "n", "r"), [(0, 5, 2), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
def test_empty_factors(m, n, r):
    found = all_triplets(LowRank(torch.zeros(m, r), torch.zeros(r, n)))
    assert found.S.shape == (0,)
    assert found.U.shape == (m, 0)
    assert found.V.shape == (n, 0)


def test_a_zero_row_stays_zero():
    delta = samples.low_rank(6, 5, 3)
    delta.B[2] = 0.0
    assert_is_svd(delta)
    assert not all_triplets(delta).U[2].any()


def test_repeated_columns_count_once():
    column, rows = samples.normal(40, 1, seed=1), samples.normal(3, 30, seed=2)
    delta = LowRank(column.repeat(1, 3), rows)
    assert len(svd(delta).S) == 1
    assert_is_svd(delta)


def test_copies_of_one_delta_have_its_rank():
    delta = samples.low_rank(40, 30, 3)
    copies = total([delta] * 4)
    assert copies.rank == 12
    assert len(svd(copies).S) == 3
    assert_is_svd(copies)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("r", [2, 3, 6])
def test_dependent_columns_of_a_tall_factor_leave_no_spurious_triplet(r, seed):
    B = samples.normal(4096, r, seed=seed, dtype=torch.float64)
    B[:, -1] = B[:, :-1] @ samples.normal(r - 1, seed=seed + 100, dtype=torch.float64)
    delta = LowRank(B, samples.normal(r, 64, seed=seed + 200))
    assert len(svd(delta).S) == r - 1
    assert_is_svd(delta)


@pytest.mark.parametrize("imbalance", [1e3, 1e6, 1e9, 1e12])
def test_badly_balanced_factors(imbalance):
    plain = samples.low_rank(9, 8, 3, seed=3)
    factors = torch.tensor([imbalance, 1.0, 1.0 / imbalance], dtype=torch.float64)
    skewed = LowRank(plain.B.double() * factors, plain.A.double() / factors[:, None])
    assert len(svd(skewed).S) == 3
    assert_is_svd(skewed)


def test_a_sum_of_scales_1e_minus_6_and_1e6_keeps_both():
    tiny = samples.low_rank(9, 8, 2, seed=4, scale=1e-6)
    large = samples.low_rank(9, 8, 2, seed=5, scale=1e6)
    summed = total([tiny, large])
    assert_is_svd(summed)
    found = svd(summed)
    assert len(found.S) == 4
    assert float(found.S[2] / found.S[0]) < 1e-10


@pytest.mark.parametrize("level", [1e-2, 1e-4, 1e-5])
def test_nearly_parallel_columns_are_resolved(level):
    column, other = samples.normal(50, 1, seed=1), samples.normal(50, 1, seed=2)
    B = torch.cat([column.double(), column.double() + level * other.double()], dim=1)
    delta = LowRank(B, samples.normal(2, 40, seed=3))
    assert len(svd(delta).S) == 2
    assert_is_svd(delta)


@pytest.mark.parametrize("level", [1e-6, 1e-8, 1e-10])
def test_what_is_lost_by_cancellation_stays_below_the_stated_rounding(level):
    column, other = samples.normal(50, 1, seed=1), samples.normal(50, 1, seed=2)
    B = torch.cat([column.double(), level * other.double() - column.double()], dim=1)
    delta = LowRank(B, samples.normal(1, 40, seed=3).repeat(2, 1))
    X, Y = bounds.balanced(delta)
    stated = np.sqrt(2 * np.sqrt(50) * 2.0**-52)
    bound = 2 * stated * oracle.singular_values(X)[0] * oracle.singular_values(Y)[0]
    expected = oracle.singular_values(samples.exact(delta))[0]
    assert delta.frobenius() == pytest.approx(expected, rel=0, abs=bound)
    found = all_triplets(delta)
    recomposed = ((found.U * found.S) @ found.V.T).numpy()
    assert oracle.frobenius(recomposed - samples.exact(delta)) <= bound


@pytest.mark.parametrize("r", [0, 1, 2, 4])
def test_compose_takes_new_values_for_the_first_triplets(r):
    found = all_triplets(samples.low_rank(9, 7, 4))
    values = torch.tensor([7.0, 5.0, 3.0, 2.0], dtype=torch.float64)[:r]
    composed = found.compose(values)
    assert composed.rank == r
    assert composed.B.dtype == composed.A.dtype == torch.float64
    expected = (found.U[:, :r].numpy() * values.numpy()) @ found.V[:, :r].numpy().T
    bound = bounds.gamma(r + 3, bounds.U32) * (
        np.abs(found.U[:, :r].numpy()) * values.numpy() @ np.abs(found.V[:, :r].numpy().T)
    )
    assert np.all(np.abs(samples.values(composed) - expected) <= bound)


@pytest.mark.parametrize("k", [0, 1, 3, 4, 9])
def test_the_first_triplets_are_those_of_the_whole(k):
    delta = samples.low_rank(30, 20, 4, dtype=torch.bfloat16, scale=0.5)
    some, whole = svd(delta).first(k), all_triplets(delta)
    assert torch.equal(some.S, whole.S[:k])
    tolerance = bounds.orthonormality(delta)
    np.testing.assert_allclose(some.U, whole.U[:, :k], rtol=0, atol=tolerance)
    np.testing.assert_allclose(some.V, whole.V[:, :k], rtol=0, atol=tolerance)


def test_it_is_exact_and_says_so():
    found = svd(samples.low_rank(30, 20, 4))
    assert found.exact() is found
    assert not found.error.any()


@pytest.mark.parametrize("length", [300, 5000])
def test_the_number_of_threads_changes_nothing(length, threads):
    delta = samples.low_rank(length, length + 700, 16, dtype=torch.bfloat16)
    threads(1)
    alone = all_triplets(delta)
    threads(3)
    shared = all_triplets(delta)
    for one, other in ((alone.U, shared.U), (alone.S, shared.S), (alone.V, shared.V)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("length", [511, 512, 513, 1024, 1300])
def test_factors_of_any_length(length):
    assert_is_svd(samples.low_rank(length, 40, 5, seed=length))
    assert_is_svd(samples.low_rank(40, length, 5, seed=length))
