"""Deltas against dense float64 arrays: norms, inner products, spectra, sums."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank, Stored, matrix_shape, total
from starmerge_models.errors import StarmergeError, UsageError
from tests.oracles import bounds, samples
from tests.oracles import deltas as oracle


def assert_spectrum(delta):
    """Singular values and both norms against numpy's SVD of the dense matrix."""
    matrix = samples.exact(delta)
    expected = oracle.singular_values(matrix)
    found = delta.singular_values()
    assert found.dtype == torch.float64
    found = found.numpy()
    assert np.all(found >= 0)
    assert np.all(np.diff(found) <= 0)
    bound = bounds.spectrum(delta)
    padded = np.zeros(max(len(found), len(expected)))
    padded[: len(found)] = found
    reference = np.zeros_like(padded)
    reference[: len(expected)] = expected
    np.testing.assert_allclose(padded, reference, rtol=0, atol=bound)
    k = len(padded)
    assert delta.nuclear() == pytest.approx(oracle.nuclear(matrix), rel=1e-13, abs=k * bound)
    assert delta.frobenius() == pytest.approx(
        oracle.frobenius(matrix), rel=1e-13, abs=np.sqrt(k) * bound
    )


@samples.SEARCH
@given(samples.low_rank_deltas())
def test_low_rank_spectrum_and_norms(delta):
    assert_spectrum(delta)


@samples.SEARCH
@given(samples.dense_deltas())
def test_dense_spectrum_and_norms(delta):
    assert_spectrum(delta)


@samples.SEARCH
@given(samples.any_deltas())
def test_to_dense_has_the_exact_values_up_to_float32(delta):
    found = delta.to_dense()
    assert found.dtype == torch.float32
    assert found.shape == delta.shape
    error = np.abs(oracle.exact(found) - samples.exact(delta))
    assert np.all(error <= bounds.weighted_sum([delta]))


@samples.SEARCH
@given(samples.any_deltas(), st.sampled_from([0.0, 1.0, -1.0, 0.25, -3.0, 1e-3]))
def test_scaled_multiplies_every_entry(delta, factor):
    scaled = delta.scaled(factor)
    assert type(scaled) is type(delta)
    stored = torch.finfo(delta.tensor.dtype) if isinstance(delta, Dense) else None
    own_rounding = stored.eps * abs(factor) * np.abs(samples.exact(delta)) if stored else 0.0
    smallest = stored.smallest_normal * stored.eps if stored else 0.0
    error = np.abs(samples.values(scaled) - factor * samples.exact(delta))
    assert np.all(error <= bounds.weighted_sum([delta], factor) + own_rounding + smallest)


@samples.SEARCH
@given(st.data(), samples.lengths, samples.lengths)
def test_inner_product(data, m, n):
    left, right = data.draw(samples.any_deltas(m, n)), data.draw(samples.any_deltas(m, n))
    expected = oracle.inner(samples.exact(left), samples.exact(right))
    bound = bounds.inner(left, right)
    assert left.inner(right) == pytest.approx(expected, rel=0, abs=bound)
    assert right.inner(left) == pytest.approx(expected, rel=0, abs=bound)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_inner_products_of_different_deltas(kind):
    deltas = samples.task_deltas(kind)
    for left in deltas:
        for right in deltas:
            expected = oracle.inner(samples.exact(left), samples.exact(right))
            bound = bounds.inner(left, right)
            assert left.inner(right) == pytest.approx(expected, rel=0, abs=bound)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_inner_product_of_a_delta_with_itself_is_its_squared_norm(kind):
    for delta in samples.task_deltas(kind):
        assert delta.inner(delta) == pytest.approx(delta.frobenius() ** 2, rel=1e-12)


def test_inner_product_of_tensors_that_are_no_matrices():
    kernel = samples.dense(4, 3, 2, 2, seed=1)
    factored = samples.low_rank(4, 12, 2, seed=2)
    expected = oracle.inner(samples.exact(kernel), samples.exact(factored))
    assert kernel.inner(factored) == pytest.approx(expected, rel=1e-13)
    assert factored.inner(kernel) == pytest.approx(expected, rel=1e-13)


@samples.SEARCH
@given(samples.task_lists())
def test_total_is_the_sum(deltas):
    summed = total(delta for delta in deltas)
    assert summed.shape == deltas[0].shape
    error = np.abs(samples.values(summed) - sum(map(samples.exact, deltas)))
    assert np.all(error <= bounds.weighted_sum(deltas))


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_total_of_every_kind_and_dtype(kind, dtype):
    deltas = samples.task_deltas(kind, dtype=dtype)
    summed = total(deltas)
    assert isinstance(summed, LowRank if kind == "low-rank" else Dense)
    error = np.abs(samples.values(summed) - sum(map(samples.exact, deltas)))
    assert np.all(error <= bounds.weighted_sum(deltas))


def test_total_of_low_rank_deltas_has_the_sum_of_the_ranks():
    assert total(samples.task_deltas("low-rank")).rank == 3 + 1 + 8 + 4


def test_total_of_one_delta_is_that_delta():
    for delta in (samples.low_rank(5, 4, 2), samples.dense(5, 4)):
        np.testing.assert_array_equal(samples.values(total([delta])), samples.values(delta))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_total_of_a_mixture_in_any_order(order):
    deltas = [samples.low_rank(6, 5, 2, seed=1), samples.dense(6, 5), samples.low_rank(6, 5, 9)]
    summed = total(deltas[i] for i in order)
    error = np.abs(samples.values(summed) - sum(map(samples.exact, deltas)))
    assert np.all(error <= bounds.weighted_sum(deltas))


@pytest.mark.parametrize("kind", samples.KINDS)
def test_total_leaves_its_inputs_alone(kind):
    deltas = samples.task_deltas(kind)
    before = [samples.exact(delta).copy() for delta in deltas]
    total(deltas)
    for delta, values in zip(deltas, before, strict=True):
        np.testing.assert_array_equal(samples.exact(delta), values)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_add_is_the_sum_of_two(kind):
    first, *_, last = samples.task_deltas(kind)
    for left, right in ((first, last), (last, first)):
        error = np.abs(samples.values(left.add(right)) - samples.exact(left) - samples.exact(right))
        assert np.all(error <= bounds.weighted_sum([left, right]))


def test_total_of_nothing_is_refused():
    with pytest.raises(UsageError, match="no delta"):
        total([])


@pytest.mark.parametrize("other", [samples.dense(4, 5), samples.low_rank(4, 5, 2)])
@pytest.mark.parametrize("delta", [samples.dense(5, 4), samples.low_rank(5, 4, 2)])
def test_total_of_different_shapes_is_refused(delta, other):
    with pytest.raises(UsageError, match=r"\(5, 4\).*\(4, 5\)"):
        total([delta, other])


def test_total_of_one_row_and_a_matrix_does_not_broadcast():
    with pytest.raises(UsageError, match="shapes"):
        total([samples.dense(3, 4), samples.dense(1, 4)])


def test_subtracting_a_low_rank_delta_from_itself_leaves_only_rounding():
    delta = samples.low_rank(12, 9, 3)
    difference = total([delta, delta.scaled(-1.0)])
    assert difference.frobenius() <= np.sqrt(6) * bounds.spectrum(difference)
    assert difference.nuclear() <= 6 * bounds.spectrum(difference)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1, 1)),
        ((5,), (5, 1)),
        ((5, 4), (5, 4)),
        ((5, 4, 3), (5, 12)),
        ((5, 4, 3, 2), (5, 24)),
        ((0, 5), (0, 5)),
        ((3, 0), (3, 0)),
        ((3, 0, 2), (3, 0)),
        ((0,), (0, 1)),
    ],
)
def test_matrix_shape(shape, expected):
    assert matrix_shape(shape) == expected
    assert Dense(torch.zeros(shape)).shape == expected
    assert Dense(torch.zeros(shape)).rank == min(expected)


def test_a_kernel_is_the_matrix_of_its_first_dimension():
    kernel = samples.dense(4, 3, 2, 2)
    np.testing.assert_array_equal(samples.values(kernel), samples.exact(kernel))
    assert_spectrum(kernel)


def test_low_rank_shape_and_rank():
    delta = samples.low_rank(6, 4, 3)
    assert delta.shape == (6, 4)
    assert delta.rank == 3


@pytest.mark.parametrize(
    ("B", "A"), [((4, 3), (2, 5)), ((4,), (1, 5)), ((4, 2, 1), (2, 5)), ((4, 2), (2,))]
)
def test_factors_that_do_not_fit_are_refused(B, A):
    with pytest.raises(UsageError, match="no factors"):
        LowRank(torch.zeros(B), torch.zeros(A))


def test_a_zero_low_rank_delta_has_no_singular_values():
    for B, A in ((torch.zeros(5, 3), torch.ones(3, 4)), (torch.ones(5, 3), torch.zeros(3, 4))):
        delta = LowRank(B, A, 2.0)
        assert len(delta.singular_values()) == 0
        assert delta.frobenius() == 0.0
        assert delta.nuclear() == 0.0
        assert delta.inner(delta) == 0.0
        assert not delta.to_dense().any()


def test_scale_zero_makes_the_delta_zero():
    delta = samples.low_rank(5, 4, 2, scale=0.0)
    assert delta.frobenius() == 0.0
    assert delta.nuclear() == 0.0
    assert not delta.to_dense().any()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_deltas_have_norm_zero(shape):
    m, n = shape
    for delta in (Dense(torch.zeros(shape)), LowRank(torch.zeros(m, 2), torch.zeros(2, n))):
        assert delta.shape == shape
        assert delta.frobenius() == delta.nuclear() == delta.inner(delta) == 0.0
        assert delta.to_dense().shape == shape
        assert total([delta, delta]).to_dense().shape == shape


def test_a_zero_row_and_a_zero_column_stay_zero():
    delta = samples.low_rank(6, 5, 3)
    delta.B[2] = 0.0
    delta.A[:, 4] = 0.0
    assert_spectrum(delta)
    assert not delta.to_dense()[2].any()
    assert not delta.to_dense()[:, 4].any()


def test_a_dead_direction_does_not_hide_the_others():
    delta = samples.low_rank(8, 7, 4)
    delta.B[:, 1] = 0.0
    delta.A[2] = 0.0
    assert len(delta.singular_values()) == 2
    assert_spectrum(delta)


@pytest.mark.parametrize("imbalance", [1e3, 1e6, 1e9, 1e12])
def test_a_huge_column_of_B_with_a_tiny_row_of_A(imbalance):
    plain = samples.low_rank(9, 8, 3, seed=3)
    factors = torch.tensor([imbalance, 1.0, 1.0 / imbalance], dtype=torch.float64)
    skewed = LowRank(plain.B.double() * factors, plain.A.double() / factors[:, None])
    reference = oracle.singular_values(samples.exact(plain))[:3]
    np.testing.assert_allclose(
        skewed.singular_values().numpy(), reference, rtol=0, atol=3 * bounds.spectrum(plain)
    )


@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_sums_of_tiny_and_large_deltas_side_by_side(dtype):
    tiny = samples.low_rank(9, 8, 2, seed=4, dtype=dtype, scale=1e-6)
    large = samples.low_rank(9, 8, 2, seed=5, dtype=dtype, scale=1e6)
    summed = total([tiny, large])
    error = np.abs(samples.values(summed) - samples.exact(tiny) - samples.exact(large))
    assert np.all(error <= bounds.weighted_sum([tiny, large]))
    assert_spectrum(summed)
    assert len(summed.singular_values()) == 4


def test_sums_of_tiny_and_large_dense_deltas():
    tiny, large = Dense(samples.dense(9, 8, seed=1).tensor * 1e-6), Dense(torch.zeros(9, 8))
    large.tensor[4, 5] = 1e6
    np.testing.assert_array_equal(
        np.delete(samples.values(total([large, tiny])).ravel(), 4 * 8 + 5),
        np.delete(samples.exact(tiny).ravel(), 4 * 8 + 5),
    )


@samples.SEARCH
@given(samples.low_rank_deltas())
def test_core_is_the_delta_in_orthonormal_bases(delta):
    core = delta.core()
    columns = oracle.exact(delta.B) @ core.left.numpy()
    rows = core.right.numpy() @ oracle.exact(delta.A)
    bound = np.sqrt(delta.rank) * bounds.spectrum(delta)
    error = oracle.frobenius(columns @ core.matrix.numpy() @ rows - samples.exact(delta))
    assert error <= bound
    tolerance = bounds.orthonormality(delta)
    for gram in (columns.T @ columns, rows @ rows.T):
        np.testing.assert_allclose(gram, np.eye(len(gram)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_the_order_of_the_tasks_does_not_matter(dtype):
    deltas = samples.task_deltas("mixed", dtype=dtype)
    bound = 2 * bounds.weighted_sum(deltas)
    difference = samples.values(total(deltas)) - samples.values(total(deltas[::-1]))
    assert np.all(np.abs(difference) <= bound)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Dense(torch.ones(3)), Dense(torch.ones(3, 4))),
        (Dense(torch.ones(1, 4)), LowRank(torch.ones(3, 1), torch.ones(1, 4))),
        (LowRank(torch.ones(1, 1), torch.ones(1, 4)), LowRank(torch.ones(3, 1), torch.ones(1, 4))),
    ],
)
def test_inner_product_of_different_shapes_is_refused(first, second):
    with pytest.raises(UsageError, match="different shapes"):
        first.inner(second)
    with pytest.raises(UsageError, match="different shapes"):
        second.inner(first)


def test_scaling_a_dense_delta_leaves_the_range_of_its_dtype():
    scaled = Dense(torch.ones(2, 2, dtype=torch.float16)).scaled(1e6)
    assert scaled.tensor.tolist() == [[1e6, 1e6], [1e6, 1e6]]


@pytest.mark.parametrize("rank", [1, 2, 8, 32])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_in_a_factor_is_refused(rank, value):
    B = torch.ones(40, rank)
    B[3, 0] = value
    for delta in (
        LowRank(B, torch.ones(rank, 7)),
        LowRank(torch.ones(40, rank), torch.ones(rank, 7), value),
    ):
        with pytest.raises(StarmergeError, match="NaN or an infinity"):
            delta.nuclear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_difference_that_overflows_is_not_finite(dtype):
    top = torch.full((3, 2), torch.finfo(dtype).max, dtype=dtype)
    half = top / 2
    fits = dtype == torch.float16  # in float32
    assert Stored([(1.0, top)], -top).is_finite() == fits
    assert Stored([(1.0, half)], -half).is_finite()
    assert Stored([(1.0, top)], top).is_finite()
    assert Stored([(1.0, top)], -top).is_finite() == bool(
        torch.isfinite(Stored([(1.0, top)], -top).tensor).all()
    )
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in range(6):
            broken = half.clone()
            broken.view(-1)[place] = bad
            assert not Stored([(1.0, broken)], half).is_finite()
            assert not Stored([(1.0, half)], broken).is_finite()
            assert not Dense(broken).is_finite()


@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(sorted(samples.DTYPES, key=str)))
def test_stored_differences_are_those_of_the_tensors(seed, dtype):
    base = samples.normal(7, 5, seed=seed, dtype=dtype)
    tuned = [samples.normal(7, 5, seed=seed + t, dtype=dtype) for t in (1, 2, 3)]
    total_delta = total([Stored([(1.0, W)], base) for W in tuned])
    assert isinstance(total_delta, Stored)
    mean = total_delta.scaled(1 / 3)
    exact = sum(samples.exact(Dense(W)) - samples.exact(Dense(base)) for W in tuned) / 3
    scale = max(np.abs(samples.exact(Dense(W))).max() for W in (*tuned, base))
    # Each difference is rounded once, each of two sums, and the factor.
    bound = 8 * torch.finfo(torch.float32).eps * scale
    np.testing.assert_allclose(mean.matrix.double().numpy(), exact, rtol=0, atol=bound)
    for rows in (slice(0, 3), slice(3, 7), slice(2, 7, 2)):
        assert torch.equal(mean.entries(rows), mean.matrix.float()[rows])
    mixed = total([Stored([(1.0, tuned[0])], base), samples.low_rank(7, 5, 2, seed=seed)])
    assert not isinstance(mixed, Stored)
    both = samples.exact(Dense(tuned[0])) - samples.exact(Dense(base))
    both = both + samples.exact(samples.low_rank(7, 5, 2, seed=seed))
    np.testing.assert_allclose(samples.exact(mixed), both, rtol=0, atol=16 * bound)


def test_factors_whose_squares_overflow_are_told_from_those_with_an_infinity():
    huge = torch.full((40, 2), 1e160, dtype=torch.float64)
    for delta in (LowRank(huge, torch.ones(2, 7)), LowRank(torch.ones(7, 2), huge.T)):
        with pytest.raises(StarmergeError, match="squares"):
            delta.nuclear()


def test_weighted_stored_differences_keep_their_weights_in_a_sum():
    base = torch.zeros(2, 3)
    parts = [
        Stored([(1.0, torch.full((2, 3), x))], base).scaled(w) for x, w in ((1.0, 2), (8.0, -0.5))
    ]
    summed = total(parts)
    assert isinstance(summed, Stored)
    assert torch.equal(summed.scaled(3).matrix, torch.full((2, 3), 3 * (2.0 * 1 - 0.5 * 8)))
