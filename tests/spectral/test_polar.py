"""The polar factor, and singular triplets above a floor."""

import numpy as np
import pytest
import torch

from starmerge_models.spectral import polar, svd_matrix
from tests.oracles import samples, tsv_m


@pytest.mark.parametrize(("m", "n"), [(9, 4), (4, 9), (6, 6), (5, 1), (1, 5)])
def test_polar_is_the_reference(m, n):
    matrix = samples.normal(m, n, seed=m + n, dtype=torch.float64)
    factor = polar(matrix)
    assert factor.dtype == torch.float64
    np.testing.assert_allclose(factor, tsv_m.polar(matrix.numpy()), atol=1e-13, rtol=0)


def test_polar_is_the_nearest_orthonormal_matrix():
    matrix = samples.normal(9, 4, seed=1, dtype=torch.float64)
    factor = polar(matrix)
    np.testing.assert_allclose(factor.T @ factor, np.eye(4), atol=1e-14)
    # The other factor of a polar decomposition is symmetric and positive.
    stretch = (factor.T @ matrix).numpy()
    np.testing.assert_allclose(stretch, stretch.T, atol=1e-14)
    assert np.linalg.eigvalsh(stretch).min() > 0


def test_directions_that_are_not_there_stay_away():
    matrix = samples.normal(9, 2, seed=1, dtype=torch.float64)
    twice = polar(torch.cat([matrix, matrix], dim=1))
    expected = polar(matrix) / np.sqrt(2)
    np.testing.assert_allclose(twice, torch.cat([expected, expected], dim=1), atol=1e-14)
    assert np.linalg.matrix_rank(twice.numpy()) == 2


def test_the_noise_decides_what_is_there():
    S = torch.tensor([2.0, 1.0, 2e-7, 2e-12], dtype=torch.float64)
    U = torch.from_numpy(samples.orthogonal(6, seed=1))[:, :4]
    V = torch.from_numpy(samples.orthogonal(4, seed=2))
    matrix = (U * S) @ V.T
    for noise, rank in ((1e-6, 2), (1e-8, 3)):
        expected = U[:, :rank] @ V[:, :rank].T
        np.testing.assert_allclose(polar(matrix, noise), expected, atol=1e-8)
    np.testing.assert_array_equal(polar(matrix), polar(matrix, 1e-10))
    np.testing.assert_allclose(polar(matrix), U[:, :3] @ V[:, :3].T, atol=1e-8)


@pytest.mark.parametrize("factor", [1e-30, 2.0**-40, 1e12])
def test_the_size_of_a_matrix_is_not_in_its_polar_factor(factor):
    matrix = samples.normal(9, 4, seed=1, dtype=torch.float64)
    twice = torch.cat([matrix, matrix], dim=1)
    for X in (matrix, twice):
        np.testing.assert_allclose(polar(factor * X), polar(X), atol=1e-13)


@pytest.mark.parametrize("shape", [(4, 3), (4, 0), (0, 3), (0, 0)])
def test_nothing_has_a_polar_factor_of_zero(shape):
    factor = polar(torch.zeros(shape, dtype=torch.float64))
    assert factor.shape == shape
    assert not factor.any()


def test_only_triplets_above_the_floor_are_returned():
    S = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    U = torch.from_numpy(samples.orthogonal(5, seed=1))[:, :3]
    V = torch.from_numpy(samples.orthogonal(4, seed=2))[:, :3]
    matrix = (U * S) @ V.T
    for floor, rank in ((-1.0, 4), (0.5, 3), (1.5, 2), (2.5, 1), (3.5, 0)):
        found = svd_matrix(matrix, floor)
        assert (found.U.shape, found.S.shape, found.V.shape) == ((5, rank), (rank,), (4, rank))
        expected = (U[:, :rank] * S[:rank]) @ V[:, :rank].T
        np.testing.assert_allclose((found.U * found.S) @ found.V.T, expected, atol=1e-14)
    assert len(svd_matrix(matrix).S) == 4
    assert len(svd_matrix(torch.zeros(4, 3), 0.0).S) == 0


def test_the_first_triplets():
    found = svd_matrix(samples.normal(5, 4, seed=3, dtype=torch.float64))
    first = found.first(2)
    np.testing.assert_array_equal(first.U, found.U[:, :2])
    np.testing.assert_array_equal(first.S, found.S[:2])
    np.testing.assert_array_equal(first.V, found.V[:, :2])
    assert len(found.first(9).S) == 4
    assert len(found.first(0).S) == 0
