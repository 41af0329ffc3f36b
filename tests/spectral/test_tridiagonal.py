"""Eigenvalues and leading eigenvectors of symmetric matrices, against numpy's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.spectral import UncertainError
from starmerge_models.spectral.tridiagonal import FullEigen, Tridiagonal
from tests.oracles import bounds, samples

SOLVERS = [Tridiagonal, FullEigen]


def symmetric(values, seed=0):
    """A symmetric matrix of given eigenvalues."""
    basis = samples.orthogonal(len(values), seed=seed)
    matrix = (basis * values) @ basis.T
    return torch.from_numpy((matrix + matrix.T) / 2)


def assert_is_eigen(solver, matrix, k):
    """Backward stable: values to a modest multiple of u|G|, vectors orthonormal, residuals small.

    Relatively robust representations take eigenvalues a share of 1e-3 apart for separate, which
    costs their vectors as many digits: they are orthonormal to p u / 1e-3.
    """
    exact = matrix.numpy().copy()
    p, size = len(exact), np.linalg.norm(exact)
    found = solver(matrix.clone())
    expected = np.linalg.eigvalsh(exact)[::-1]
    tolerance = 16 * p * bounds.U64 * size
    np.testing.assert_allclose(found.values.numpy(), expected, rtol=0, atol=tolerance)
    vectors = found.vectors(k).numpy()
    assert vectors.shape == (p, k)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), rtol=0, atol=p * bounds.U64 / 1e-3)
    residual = exact @ vectors - vectors * expected[:k]
    np.testing.assert_allclose(residual, 0, rtol=0, atol=4 * tolerance)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("k", [1, 2, 40, 150])
def test_random_matrices(solver, k):
    assert_is_eigen(solver, symmetric(np.random.default_rng(0).standard_normal(150)), k)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [2, 3])
def test_the_smallest_matrices(solver, p):
    for k in range(1, p + 1):
        assert_is_eigen(solver, symmetric(np.arange(p) - 1.0), k)


def test_a_single_number_is_not_for_lapack():
    with pytest.raises(ValueError, match="A matrix of 1 rows"):
        Tridiagonal(torch.ones(1, 1, dtype=torch.float64))
    assert_is_eigen(FullEigen, symmetric([3.0]), 1)


@samples.SEARCH
@given(st.integers(2, 40), st.data())
def test_integer_spectra_with_repeated_values(p, data):
    values = data.draw(st.lists(st.integers(-3, 3), min_size=p, max_size=p))
    k = data.draw(st.integers(1, p))
    matrix = symmetric(np.array(values, dtype=float), seed=p)
    try:
        assert_is_eigen(Tridiagonal, matrix, k)
    except UncertainError:  # dlarrv may give up on clusters; then the exact SVD is made
        assert len(set(values)) < p
    assert_is_eigen(FullEigen, matrix, k)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_matrix_that_falls_into_blocks(solver):
    parts = [symmetric(np.linspace(1, 2 + i, 20 + i), seed=i) for i in range(3)]
    assert_is_eigen(solver, torch.block_diag(*parts), 30)


@pytest.mark.parametrize("solver", SOLVERS)
def test_diagonal_matrices(solver):
    assert_is_eigen(solver, torch.diag(torch.tensor([3.0, 5, 1, 5, 4, 2], dtype=torch.float64)), 4)
    assert_is_eigen(solver, torch.eye(9, dtype=torch.float64), 9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_only_the_upper_triangle_is_read(solver):
    matrix = symmetric(np.arange(1.0, 31.0))
    upper = matrix.triu() + torch.full_like(matrix, 7.0).tril(-1)
    found, expected = solver(upper), solver(matrix.clone())
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-12)


def test_vectors_can_be_asked_for_again():
    found = Tridiagonal(symmetric(np.arange(1.0, 51.0)))
    first = found.vectors(10).clone()
    found.vectors(30)
    assert torch.equal(found.vectors(10), first)


def test_what_lapack_cannot_solve_is_uncertain():
    matrix = symmetric(np.arange(1.0, 31.0))
    matrix[3, 4] = float("nan")
    with pytest.raises(UncertainError, match="dsterf failed"):
        Tridiagonal(matrix)
