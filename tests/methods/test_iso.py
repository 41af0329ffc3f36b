"""Isotropic merging against its float64 reference, and flat spectra."""

import numpy as np
import pytest
from hypothesis import assume, given

from starmerge_models.deltas import LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import IsoC, IsoCts, make_method
from tests.oracles import iso, samples, spectral, tsv_m
from tests.products import one_in

WEIGHTS = [1.0, 0.5, -2.0, 4.0]


def matrices(deltas, weights=None):
    weights = weights or [1.0] * len(deltas)
    return [w * samples.exact(delta) for w, delta in zip(weights, deltas, strict=True)]


def spectrum(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), spectral.SHAPES)
def test_iso_c_is_the_reference(m, n, kind, dtype):
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    found = spectral.merged(IsoC(alpha=1.3), deltas)
    spectral.assert_close(found, iso.iso_c(matrices(deltas), 1.3), deltas)
    found = spectral.merged(IsoC(), deltas, WEIGHTS)
    spectral.assert_close(found, iso.iso_c(matrices(deltas, WEIGHTS)), deltas, times=4)


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "common"),
    one_in(3, spectral.SHAPES, samples.KINDS, samples.DTYPES, [0.0, 0.3, 0.8, 0.95, 1.0]),
)
def test_iso_cts_is_the_reference(shape, kind, dtype, common):
    m, n = shape
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    found = spectral.merged(IsoCts(alpha=1.3, common=common), deltas)
    spectral.assert_close(found, iso.iso_cts(matrices(deltas), 1.3, common), deltas)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_weights_multiply_the_task_vectors(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(IsoCts(), deltas, WEIGHTS)
    spectral.assert_close(found, iso.iso_cts(matrices(deltas, WEIGHTS)), deltas, times=4)


def is_well_conditioned(deltas):
    """All singular values of the sum either a good part of the norms, or rounding."""
    size = tsv_m.scale(matrices(deltas))
    values = spectrum(sum(matrices(deltas)))
    return size > 0 and not np.any((values > 1e-13 * size) & (values < 1e-2 * size))


@samples.SEARCH
@given(samples.task_lists())
def test_every_shape_rank_and_dtype(deltas):
    assume(is_well_conditioned(deltas))
    found = spectral.merged(IsoC(), deltas)
    spectral.assert_close(found, iso.iso_c(matrices(deltas)), deltas)


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), spectral.SHAPES)
def test_iso_c_keeps_directions_and_nuclear_norm_of_the_sum(m, n, kind):
    deltas = samples.task_deltas(kind, m, n)
    found, summed = spectral.merged(IsoC(), deltas), sum(matrices(deltas))
    values = spectrum(found)
    rank = np.linalg.matrix_rank(summed)
    np.testing.assert_allclose(values[:rank], spectrum(summed).sum() / rank, rtol=1e-6)
    np.testing.assert_allclose(values[rank:], 0.0, atol=1e-5)
    # M τᵀ for τ = UΣVᵀ is α σ̄ UΣUᵀ: symmetric and not negative.
    product = found @ summed.T
    np.testing.assert_allclose(product, product.T, atol=1e-6 * np.linalg.norm(product))
    assert np.linalg.eigvalsh(product).min() >= -1e-6 * np.linalg.norm(product)


@pytest.mark.parametrize("method", [IsoC(), IsoCts()])
def test_null_directions_of_adapters_stay_null(method):
    deltas = spectral.shared_A()
    values = spectrum(spectral.merged(method, deltas))
    assert values[2] == pytest.approx(values[0], rel=1e-6)
    assert values[3] <= 1e-6 * values[0]


@pytest.mark.parametrize("kind", samples.KINDS)
def test_one_task_is_flattened_too(kind):
    delta = samples.task_deltas(kind, 30, 20)[0]
    rank = np.linalg.matrix_rank(samples.exact(delta))
    for method in (IsoC(), IsoCts()):
        values = spectrum(spectral.merged(method, [delta]))
        np.testing.assert_allclose(values[:rank], values[:rank].mean(), rtol=1e-6)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_without_directions_of_the_tasks_iso_cts_is_iso_c(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    expected = spectral.merged(IsoC(), deltas)
    spectral.assert_close(spectral.merged(IsoCts(common=1.0), deltas), expected, deltas, times=2)
    one = [deltas[0]]
    expected = spectral.merged(IsoC(), one)
    for common in (0.0, 0.5, 0.8):
        found = spectral.merged(IsoCts(common=common), one)
        spectral.assert_close(found, expected, one, times=2)


def test_equal_tasks_add_up_to_a_flat_sum():
    delta = samples.low_rank(30, 20, 4)
    expected = 3 * spectral.merged(IsoC(), [delta])
    spectral.assert_close(spectral.merged(IsoC(), [delta] * 3), expected, [delta] * 3, times=4)


def test_orthogonal_tasks_keep_their_directions():
    deltas = spectral.orthogonal_tasks()
    mean = np.mean([1, 2, 3, 4, 5, 6])
    directions = sum(delta.B.double() / delta.B.norm(dim=0) @ delta.A for delta in deltas).numpy()
    for method in (IsoC(), IsoCts(), IsoCts(common=0.5)):
        spectral.assert_close(spectral.merged(method, deltas), mean * directions, deltas)


def test_the_residual_is_without_the_common_columns_only():
    # Two tasks of one direction each: u_1 v_1 and u_2 v_1 share v_1. R = 1, so all is common.
    Q, P = samples.orthogonal(5, seed=1), samples.orthogonal(4, seed=2)
    deltas = [
        samples.rotated(LowRank(*_unit(5, 4, i, j), scale), Q, P)
        for i, j, scale in ((0, 0, 5.0), (1, 1, 3.0), (0, 1, 2.0))
    ]
    found = spectral.merged(IsoCts(common=0.0), deltas)
    spectral.assert_close(found, iso.iso_cts(matrices(deltas), common=0.0), deltas)


def _unit(m, n, i, j):
    import torch

    return torch.eye(m, dtype=torch.float64)[:, [i]], torch.eye(n, dtype=torch.float64)[[j]]


@pytest.mark.parametrize("common", [-0.1, 1.1, "most"])
def test_a_share_out_of_range_is_refused(common):
    with pytest.raises(UsageError, match="common"):
        make_method("iso_cts", {"common": common})
