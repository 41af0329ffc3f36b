"""Task vectors in Core Space that are kept as factors, against the matrices that they stand for."""

import numpy as np
import pytest
import torch

from starmerge_models.deltas import LowRank
from starmerge_models.spectral import core_space
from starmerge_models.spectral.coordinates import (
    FactoredCoordinates,
    MatrixCoordinates,
    coordinates,
    svd_product,
)
from tests.oracles import bounds, samples, spectral


def assert_is_svd(found, left, right, scale):
    """It is that of the product, but for float64's rounding of its terms."""
    U, S, V = found.U.numpy(), found.S.numpy(), found.V.numpy()
    matrix = scale * left.double().numpy() @ right.double().numpy().T
    p, q = matrix.shape
    sizes = np.linalg.norm(left.double(), axis=0) * np.linalg.norm(right.double(), axis=0)
    bound = 8 * (p + q) * bounds.U64 * abs(scale) * np.sum(sizes)
    expected = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(S, expected[: len(S)], rtol=0, atol=bound)
    assert np.all(expected[len(S) :] <= bound)
    assert np.linalg.norm((U * S) @ V.T - matrix) <= bound
    for basis in (U, V):
        atol = 8 * (p + q) * bounds.U64
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(S)), rtol=0, atol=atol)


@pytest.mark.parametrize("scale", [1.0, -0.3, 1e-12, 1e9])
@pytest.mark.parametrize("rank", [0, 1, 3, 9])
@pytest.mark.parametrize(("p", "q"), [(30, 20), (9, 40), (40, 9), (9, 9)])
def test_the_svd_of_a_product_is_that_of_the_matrix(p, q, rank, scale):
    left = samples.normal(p, rank, seed=1, dtype=torch.float64)
    right = samples.normal(q, rank, seed=2, dtype=torch.float64)
    assert_is_svd(svd_product(left, right, scale), left, right, scale)


@pytest.mark.parametrize("imbalance", [1e3, 1e9, 1e15])
def test_badly_balanced_factors_keep_their_digits(imbalance):
    factors = torch.tensor([imbalance, 1.0, 1.0 / imbalance], dtype=torch.float64)
    left = samples.normal(30, 3, seed=1, dtype=torch.float64) * factors
    right = samples.normal(20, 3, seed=2, dtype=torch.float64) / factors
    assert_is_svd(svd_product(left, right, 1.0), left, right, 1.0)


def test_parallel_columns_have_no_direction_of_their_own():
    one = samples.normal(30, 1, seed=1, dtype=torch.float64)
    left = torch.cat([one, -2 * one, one], 1)
    right = samples.normal(20, 3, seed=2, dtype=torch.float64)
    found = FactoredCoordinates(left, right, 1.0)
    assert len(found.svd(1e-10 * found.norm).S) == 1
    assert_is_svd(found.svd(-1.0), left, right, 1.0)


def cancelling(rest):
    B, A = samples.normal(30, 1, seed=1), samples.normal(1, 20, seed=2)
    B, A = torch.tensor([[0.1, 0.2, -0.3]]) * B, torch.tensor([[0.7], [0.7], [0.7]]) * A
    return LowRank(torch.cat([B, -B * (1 - rest)], 1), torch.cat([A, A]), 3.0)


@pytest.mark.parametrize("others", [0, 8])
def test_terms_that_cancel_leave_neither_matrix_nor_triplets(others):
    space = core_space(
        [cancelling(0.0), *(samples.low_rank(30, 20, 4, seed=t) for t in range(others))]
    )
    (zero, *rest) = space.tasks
    assert zero.is_zero
    assert zero.norm == 0.0
    assert not zero.matrix.any()
    assert len(zero.svd(0.0).S) == 0
    assert not any(task.is_zero for task in rest)


def test_terms_that_nearly_cancel_leave_their_difference():
    delta = cancelling(2.0**-20)
    found = coordinates(delta.B, delta.A.T, delta.scale)
    assert isinstance(found, FactoredCoordinates)
    assert not found.is_zero
    assert_is_svd(found.svd(-1.0), delta.B, delta.A.T, delta.scale)


@pytest.mark.parametrize("rest", [0.0, 2.0**-20, 1.0])
def test_factors_and_their_matrix_tell_the_same(rest):
    delta = cancelling(rest)
    factored = FactoredCoordinates(delta.B, delta.A.T, delta.scale)
    whole = MatrixCoordinates(factored.matrix)
    assert factored.is_zero == whole.is_zero
    size = np.linalg.norm(bounds.magnitude(delta))
    assert factored.norm == pytest.approx(whole.norm, abs=1e-14 * size)


def test_what_is_smaller_is_kept():
    B, A = samples.normal(30, 12, seed=1), samples.normal(20, 12, seed=2)
    assert isinstance(coordinates(B[:, :11], A[:, :11], 1.0), FactoredCoordinates)
    assert isinstance(coordinates(B, A, 1.0), MatrixCoordinates)


@pytest.mark.parametrize(("m", "n"), [*spectral.SHAPES, (200, 150), (20, 100)])
def test_many_tasks_of_low_rank_keep_their_factors(m, n):
    """Below, above one, and above both of the sides, whatever the basis."""
    deltas = [samples.low_rank(m, n, 3, seed=t) for t in range(16)]
    space = core_space(deltas)
    assert all(isinstance(task, FactoredCoordinates) for task in space.tasks)
    whole = space.as_matrices()
    assert all(isinstance(task, MatrixCoordinates) for task in whole.tasks)
    assert whole.floor == pytest.approx(space.floor, rel=1e-12)
    for task, matrix in zip(space.tasks, whole.matrices, strict=True):
        assert torch.equal(task.matrix, matrix)
        found = task.svd(-1.0)
        size = float(torch.linalg.vector_norm(matrix))
        product = (found.U * found.S) @ found.V.T
        torch.testing.assert_close(product, matrix, rtol=0, atol=1e-13 * size)


def test_adapters_beside_full_fine_tunes_keep_their_factors_where_the_coordinates_stay():
    low, full = samples.low_rank(30, 20, 3), samples.dense(30, 20)
    tasks = core_space([low, full]).tasks
    assert [type(task) for task in tasks] == [FactoredCoordinates, MatrixCoordinates]
    low, full = samples.low_rank(100, 20, 3), samples.dense(100, 20)
    space = core_space([low, full])
    assert space.U is not None
    assert [type(task) for task in space.tasks] == [MatrixCoordinates, MatrixCoordinates]
