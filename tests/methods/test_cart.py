"""CART against its float64 reference."""

import numpy as np
import pytest
from hypothesis import assume, given

from starmerge_models.errors import UsageError
from starmerge_models.methods import Average, Cart, make_method
from tests.oracles import cart, linear, samples, spectral, tsv_m
from tests.products import one_in

WEIGHTS = [1.0, 0.5, 2.0, 4.0]
RANKS = [
    (0.08, {}),
    (0.5, {"fraction": 0.5}),
    (1.0, {"fraction": 1.0}),
    (1, {"rank": 1}),
    (3, {"rank": 3}),
]


def matrices(deltas):
    return [samples.exact(delta) for delta in deltas]


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "ranks"),
    one_in(3, spectral.SHAPES, samples.KINDS, samples.DTYPES, RANKS),
)
def test_cart_is_the_reference(shape, kind, dtype, ranks):
    m, n = shape
    rank, named = ranks
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    found = spectral.merged(Cart(rank=rank, lambda_=0.7), deltas)
    spectral.assert_close(found, cart.cart(matrices(deltas), lam=0.7, **named), deltas)


@pytest.mark.parametrize(("rank", "named"), RANKS)
@pytest.mark.parametrize(("m", "n"), [(150, 140), (130, 300)])
def test_task_vectors_large_enough_for_the_fast_decomposition(m, n, rank, named):
    deltas = samples.task_deltas("mixed", m, n)
    found = spectral.merged(Cart(rank=rank), deltas)
    spectral.assert_close(found, cart.cart(matrices(deltas), **named), deltas)


@pytest.mark.parametrize(("rank", "named"), RANKS)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, -0.5, 2.0, -4.0], [0.0, 2.0, 2.0, 1.0]])
def test_weights_are_in_the_mean_and_on_the_residuals(kind, rank, named, weights):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(Cart(rank=rank), deltas, weights)
    expected = cart.cart(matrices(deltas), weights=weights, **named)
    spectral.assert_close(found, expected, deltas, times=8)


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("rank", [0.08, 0.5, 2])
def test_tasks_without_a_delta_count_as_zero(kind, rank):
    first, second, third, _ = samples.task_deltas(kind, 30, 20)
    weights = [1.0, 0.5, 2.0, 4.0, 1.0]
    found = spectral.merged(Cart(rank=rank), [first, None, second, None, third], weights)
    nothing = np.zeros((30, 20))
    tau = [*matrices([first]), nothing, *matrices([second]), nothing, *matrices([third])]
    named = {"rank": rank} if isinstance(rank, int) else {"fraction": rank}
    expected = cart.cart(tau, weights=weights, **named)
    spectral.assert_close(found, expected, [first, second, third], times=4)


@samples.SEARCH
@given(samples.task_lists())
def test_every_shape_rank_and_dtype(deltas):
    tau = matrices(deltas)
    mean, size = sum(tau) / len(tau), tsv_m.scale(tau)
    for matrix in tau:
        sigma = np.linalg.svd(matrix - mean, compute_uv=False)
        assume(not np.any((sigma > 1e-13 * size) & (sigma < 1e-5 * size)))
        assume(len(sigma) < 2 or sigma[0] - sigma[1] > 1e-3 * size or sigma[0] < 1e-13 * size)
    found = spectral.merged(Cart(rank=1), deltas)
    spectral.assert_close(found, cart.cart(tau, rank=1), deltas)


@pytest.mark.parametrize("lambda_", [0.0, 1.0, 7.0])
@pytest.mark.parametrize("rank", [1.0, 20])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_all_of_the_residuals_is_the_average(kind, rank, lambda_):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(Cart(rank=rank, lambda_=lambda_), deltas)
    spectral.assert_close(found, linear.average(matrices(deltas)), deltas)
    averaged = spectral.merged(Average(), deltas)
    np.testing.assert_allclose(found, averaged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_one_task_is_itself(kind):
    for delta in samples.task_deltas(kind, 30, 20):
        found = spectral.merged(Cart(lambda_=3.0), [delta])
        spectral.assert_close(found, samples.exact(delta), [delta])


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_equal_tasks_are_that_task(kind):
    delta = samples.task_deltas(kind, 30, 20)[2]
    found = spectral.merged(Cart(lambda_=3.0), [delta] * 3)
    spectral.assert_close(found, samples.exact(delta), [delta] * 3)


def test_orthogonal_tasks_are_the_reference():
    deltas = spectral.orthogonal_tasks()
    for rank in (1, 2):
        found = spectral.merged(Cart(rank=rank), deltas)
        spectral.assert_close(found, cart.cart(matrices(deltas), rank=rank), deltas)


def test_a_number_and_a_fraction_are_told_apart():
    assert type(make_method("cart", {"rank": 1}).rank) is int
    assert type(make_method("cart", {"rank": 1.0}).rank) is float
    deltas = samples.task_deltas("low-rank", 30, 20)
    difference = spectral.merged(Cart(rank=1), deltas) - spectral.merged(Cart(rank=1.0), deltas)
    assert np.linalg.norm(difference) > 1.0


def test_a_fraction_is_one_of_the_residuals_own_rank():
    # The sixteen directions of the residuals: 0.08 of them is one, of min(m, n) it would be 16.
    deltas = samples.task_deltas("low-rank", 220, 210)
    found = spectral.merged(Cart(rank=0.08), deltas)
    spectral.assert_close(found, spectral.merged(Cart(rank=1), deltas), deltas, times=2)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, "most"])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(UsageError, match="rank"):
        make_method("cart", {"rank": rank})


def test_weights_that_sum_to_zero_are_refused():
    with pytest.raises(UsageError, match="sum to zero"):
        spectral.merge(Cart(), samples.task_deltas("low-rank")[:2], [1.0, -1.0])
