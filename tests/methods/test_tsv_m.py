"""TSV-Merge against its float64 reference, and what orthogonal task vectors mean."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from starmerge_models.deltas import LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import TsvM, make_method
from tests.oracles import samples, spectral, tsv_m

WEIGHTS = [1.0, 0.5, -2.0, 4.0]
"""Powers of two: float32 holds the weighted deltas."""


def matrices(deltas, weights=None):
    weights = weights or [1.0] * len(deltas)
    return [w * samples.exact(delta) for w, delta in zip(weights, deltas, strict=True)]


@pytest.mark.parametrize("triplets", ["share", "all", 1, 3])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), spectral.SHAPES)
def test_tsv_m_is_the_reference(m, n, kind, dtype, triplets):
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    found = spectral.merged(TsvM(triplets=triplets, alpha=0.7), deltas)
    expected = tsv_m.tsv_m(matrices(deltas), 0.7, triplets)
    spectral.assert_close(found, expected, deltas)


@pytest.mark.parametrize("triplets", ["share", "all", 2])
@pytest.mark.parametrize(("m", "n"), [(30, 20), (12, 40), (60, 90)])
def test_many_adapters_are_the_reference(m, n, triplets):
    """Their ranks add up to more than both sides; one is zero, and one all rounding."""
    deltas = [samples.low_rank(m, n, 3, seed=t, scale=1.0 + t % 3) for t in range(32)]
    B, A = samples.normal(m, 1, seed=98), samples.normal(1, n, seed=99)
    deltas[1] = spectral.zero(m, n)
    found = spectral.merged(TsvM(triplets=triplets), deltas)
    expected = tsv_m.tsv_m(matrices(deltas), triplets=triplets)
    spectral.assert_close(found, expected, deltas, condition=1e6)
    deltas[1] = LowRank(torch.cat([B, -B], 1), torch.cat([A, A]))
    np.testing.assert_array_equal(spectral.merged(TsvM(triplets=triplets), deltas), found)


@samples.SEARCH
@given(samples.task_lists(), st.sampled_from(["share", "all", 1, 2]))
def test_every_shape_rank_and_dtype(deltas, triplets):
    tasks = tsv_m.not_zero(matrices(deltas))
    assume(tasks)
    size = tsv_m.scale(tasks)
    U, Vt = [], []
    for tau in tasks:
        left, sigma, right = tsv_m.triplets_of(tau, size)
        k = tsv_m.share(*tau.shape, len(tasks)) if triplets == "share" else triplets
        k = len(sigma) if k == "all" else min(k, len(sigma))
        # A spectrum with a gap where it is cut, none of it near rounding.
        assume(k > 0 and sigma[-1] > 1e-3 * size)
        assume(k == len(sigma) or sigma[k - 1] - sigma[k] > 1e-2 * sigma[0])
        U.append(left[:, :k])
        Vt.append(right[:k])
    for stack in (np.hstack(U), np.vstack(Vt)):
        values = np.linalg.svd(stack, compute_uv=False)
        assume(values[values > 1e-8].min() > 1e-3)
    found = spectral.merged(TsvM(triplets=triplets), deltas)
    expected = tsv_m.tsv_m(matrices(deltas), triplets=triplets)
    spectral.assert_close(found, expected, deltas, condition=1e6)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_weights_multiply_the_task_vectors(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(TsvM(), deltas, WEIGHTS)
    spectral.assert_close(found, tsv_m.tsv_m(matrices(deltas, WEIGHTS)), deltas, times=4)


def test_weights_only_stretch_directions_and_a_negative_one_turns_them():
    deltas = samples.task_deltas("low-rank", 30, 20)
    plain, weighted = [], []
    for t in range(4):
        # Only task t with a strength worth telling: what it gets of the common directions.
        others = [1e-6] * 4
        others[t] = 1.0
        plain.append(spectral.merged(TsvM(), deltas, others))
        others[t] = -2.0
        weighted.append(spectral.merged(TsvM(), deltas, others))
    for a, b in zip(plain, weighted, strict=True):
        np.testing.assert_allclose(b, -2.0 * a, atol=1e-3)
    whole = spectral.merged(TsvM(), deltas)
    np.testing.assert_allclose(sum(plain), whole, atol=1e-3)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_one_task_is_itself(kind):
    for delta in samples.task_deltas(kind, 30, 20):
        expected = samples.exact(delta)
        spectral.assert_close(spectral.merged(TsvM(), [delta]), expected, [delta])
        half = spectral.merged(TsvM(alpha=-0.5), [delta])
        spectral.assert_close(half, -0.5 * expected, [delta])


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_equal_tasks_are_that_task_and_no_sum(kind, copies):
    delta = samples.task_deltas(kind, 30, 20)[3]
    found = spectral.merged(TsvM(triplets="all"), [delta] * copies)
    spectral.assert_close(found, samples.exact(delta), [delta] * copies)


def test_orthogonal_tasks_are_added():
    deltas = spectral.orthogonal_tasks()
    expected = sum(matrices(deltas))
    spectral.assert_close(spectral.merged(TsvM(), deltas), expected, deltas)


@pytest.mark.parametrize(("tasks", "kept"), [(1, 6), (2, 3), (3, 2), (4, 1), (6, 1), (9, 1)])
def test_a_share_is_the_shorter_side_over_the_tasks_and_at_least_one(tasks, kept):
    deltas = [samples.dense(6, 8, seed=t) for t in range(tasks)]
    found = spectral.merged(TsvM(), deltas)
    expected = spectral.merged(TsvM(triplets=kept), deltas)
    np.testing.assert_array_equal(found, expected)
    if tasks > 1:
        assert np.linalg.norm(found - spectral.merged(TsvM(triplets=kept + 1), deltas)) > 0.1


def test_tasks_that_leave_the_tensor_alone_do_not_take_a_share():
    deltas = [samples.dense(6, 8, seed=t) for t in range(2)]
    found = spectral.merged(TsvM(), [*deltas, None, spectral.zero(6, 8)])
    spectral.assert_close(found, tsv_m.tsv_m(matrices(deltas), triplets=3), deltas)


def test_adapters_keep_all_their_triplets_where_the_matrix_has_room():
    deltas = samples.task_deltas("low-rank", 40, 36)
    np.testing.assert_array_equal(
        spectral.merged(TsvM(), deltas), spectral.merged(TsvM(triplets="all"), deltas)
    )
    assert spectral.merge(TsvM(), deltas).rank == 16


@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_adapters_with_one_A_have_no_arbitrary_directions(dtype):
    deltas = spectral.shared_A(dtype=dtype)
    found = spectral.merged(TsvM(), deltas)
    spectral.assert_close(found, tsv_m.tsv_m(matrices(deltas)), deltas)
    values = np.linalg.svd(found, compute_uv=False)
    assert values[3] <= 1e-6 * values[0]


def test_the_result_has_orthogonal_directions_of_the_tasks_singular_values():
    deltas = samples.task_deltas("low-rank", 40, 36)
    sigma = np.concatenate(
        [
            np.linalg.svd(tau, compute_uv=False)[:r]
            for tau, r in zip(matrices(deltas), (3, 1, 8, 4), strict=True)
        ]
    )
    found = np.linalg.svd(spectral.merged(TsvM(), deltas), compute_uv=False)
    np.testing.assert_allclose(found[:16], np.sort(sigma)[::-1], rtol=1e-6)


@pytest.mark.parametrize("triplets", [0, -1, "most", 1.5])
def test_triplets_out_of_range_are_refused(triplets):
    with pytest.raises(UsageError, match="triplets"):
        make_method("tsv_m", {"triplets": triplets})


def test_vectors_are_averaged_whatever_alpha():
    deltas = [samples.dense(5, seed=t) for t in range(2)]
    found = spectral.merged(TsvM(alpha=3.0), deltas)
    np.testing.assert_allclose(found, sum(matrices(deltas)) / 2, rtol=0, atol=1e-6)
    assert torch.isfinite(torch.from_numpy(found)).all()
