"""The SVD of dense deltas against numpy's."""

import numpy as np
import pytest
import torch
from hypothesis import given

from starmerge_models.deltas import Dense
from starmerge_models.spectral import svd, svd_dense
from tests.oracles import bounds, samples
from tests.oracles import deltas as oracle


def assert_is_svd(delta):
    """The factors are float64, orthonormal, of numpy's singular values, and give the delta."""
    found = svd_dense(delta)
    assert found.U.dtype == found.S.dtype == found.V.dtype == torch.float64
    U, S, V = found.U.numpy(), found.S.numpy(), found.V.numpy()
    matrix, bound = samples.exact(delta), bounds.spectrum(delta)
    k = min(matrix.shape) if matrix.any() else 0
    assert (U.shape, S.shape, V.shape) == ((matrix.shape[0], k), (k,), (matrix.shape[1], k))
    np.testing.assert_allclose(S, oracle.singular_values(matrix)[:k], rtol=0, atol=bound)
    assert oracle.frobenius((U * S) @ V.T - matrix) <= np.sqrt(k) * bound
    for basis in (U, V):
        np.testing.assert_allclose(
            basis.T @ basis, np.eye(k), rtol=0, atol=bounds.orthonormality(delta)
        )


@samples.SEARCH
@given(samples.dense_deltas())
def test_every_shape_and_dtype(delta):
    assert_is_svd(delta)


@pytest.mark.parametrize("shape", [(40, 3), (3, 40), (1, 17), (17, 1), (6, 3, 2, 2), (1, 3, 2, 2)])
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_tall_wide_and_kernels(shape, dtype):
    assert_is_svd(samples.dense(*shape, dtype=dtype))


def test_a_vector_has_one_singular_value():
    vector = samples.dense(5)
    found = svd(vector)
    assert found.S.shape == (1,)
    assert float(found.S) == pytest.approx(oracle.frobenius(samples.exact(vector)), rel=1e-15)
    assert_is_svd(vector)


def test_a_scalar_has_its_absolute_value():
    found = svd(Dense(torch.tensor(-3.0)))
    assert found.S.tolist() == [3.0]
    assert float(found.U * found.S * found.V) == -3.0


def test_a_zero_matrix_has_no_triplets():
    found = svd(Dense(torch.zeros(4, 3)))
    assert (found.U.shape, found.S.shape, found.V.shape) == ((4, 0), (0,), (3, 0))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (0,), (4, 0, 2)])
def test_empty_tensors(shape):
    found = svd(Dense(torch.zeros(shape)))
    assert found.S.shape == (0,)
    assert found.U.shape[1] == found.V.shape[1] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    matrix = torch.ones(4, 3)
    matrix[1, 2] = value
    with pytest.raises(torch.linalg.LinAlgError):
        svd_dense(Dense(matrix))


def test_bfloat16_entries_are_decomposed_as_they_are_stored():
    stored = samples.dense(6, 5, dtype=torch.bfloat16)
    expected = oracle.singular_values(samples.exact(stored))
    np.testing.assert_allclose(svd(stored).S.numpy(), expected, rtol=1e-13)
