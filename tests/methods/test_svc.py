"""Singular value calibration against its float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.merging.in_memory import merge_state
from starmerge_models.methods import IsoC, IsoCts, Pipeline, Svc, TaskArithmetic, make_pipeline
from tests.oracles import samples, spectral, svc
from tests.products import one_in

MERGES = ["task_arithmetic", "average", "tsv_m", "covariance"]


def matrices(deltas):
    return [samples.exact(delta) for delta in deltas]


def calibrate(step, merged, deltas, **given):
    """Apply the step to an update, so that the reference sees the stored one too."""
    context = spectral.context(deltas, **given)
    return samples.exact(step.apply(merged, spectral.given(deltas), context, None))


def assert_is_svc(step, merged, deltas, alpha=None, condition=1e5):
    found = calibrate(step, merged, deltas)
    expected = svc.svc(samples.exact(merged), matrices(deltas), alpha)
    spectral.assert_close(found, expected, [*deltas, merged], condition=condition)


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "alpha", "merge"),
    one_in(
        4,
        [(9, 7), (30, 20), (40, 12)],
        samples.KINDS,
        samples.DTYPES,
        [None, 0.1, 1.0, 2.5],
        MERGES,
    ),
)
def test_svc_is_the_reference(shape, kind, dtype, alpha, merge):
    m, n = shape
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    merged = spectral.merge(merge, deltas)
    assert_is_svc(Svc(alpha=alpha), merged, deltas, alpha)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_it_is_a_step_of_a_chain(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    chain = make_pipeline("task_arithmetic+svc", {"task_arithmetic.alpha": 1, "svc.alpha": 1})
    assert chain == Pipeline.of([TaskArithmetic(alpha=1.0), Svc(alpha=1.0)])
    merged = spectral.merge(TaskArithmetic(alpha=1.0), deltas)
    found = spectral.merged(chain, deltas)
    np.testing.assert_array_equal(found, calibrate(Svc(alpha=1.0), merged, deltas))


def test_the_default_alpha_is_one_over_the_tasks():
    deltas = samples.task_deltas("low-rank", 30, 20)
    merged = spectral.merge("task_arithmetic", deltas)
    found = calibrate(Svc(), merged, deltas)
    np.testing.assert_array_equal(found, calibrate(Svc(alpha=0.25), merged, deltas))


@samples.SEARCH
@given(samples.task_lists(), st.sampled_from([0.3, 1.0]))
def test_every_shape_rank_and_dtype(deltas, alpha):
    tau = matrices(deltas)
    size = sum(map(np.linalg.norm, tau))
    merged = spectral.merge(TaskArithmetic(alpha=1.0), deltas)
    U, sigma, _ = np.linalg.svd(samples.exact(merged), full_matrices=False)
    assume(size > 0 and sigma[0] > 1e-2 * size)
    # Directions apart, and every response either there or not.
    assume(len(sigma) < 2 or np.min(-np.diff(sigma)) > 1e-3 * size)
    assume(sigma[-1] > 1e-3 * size)
    for delta in filter(np.any, tau):
        responses = np.linalg.norm(U.T @ delta, axis=1) / np.linalg.norm(delta)
        assume(not np.any((responses > 1e-14) & (responses < 1e-2)))
    assert_is_svc(Svc(alpha=alpha), merged, deltas, alpha, condition=1e7)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_alpha_1_only_ever_shrinks(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    merged = spectral.merge(TaskArithmetic(alpha=1.0), deltas)
    before = np.linalg.svd(samples.exact(merged), compute_uv=False)
    after = np.linalg.svd(calibrate(Svc(alpha=1.0), merged, deltas), compute_uv=False)
    assert np.all(after <= before + 1e-6 * before[0])
    assert after.sum() < before.sum()


@pytest.mark.parametrize("copies", [2, 5])
def test_the_sum_of_equal_tasks_becomes_the_task_and_their_mean_stays(copies):
    delta = samples.low_rank(30, 20, 4)
    expected = samples.exact(delta)
    for chain in ("task_arithmetic+svc", "average+svc"):
        parameters = {"task_arithmetic.alpha": 1} if "task" in chain else {}
        found = spectral.merged(make_pipeline(chain, parameters), [delta] * copies)
        spectral.assert_close(found, expected, [delta] * copies, times=8)


@pytest.mark.parametrize("alpha", [1.0, 0.4, 0.7])
@pytest.mark.parametrize("stored", ["factors", "matrices", "float32"])
def test_the_sum_of_orthogonal_tasks_stays(stored, alpha):
    # u_r as float32 knows it answers every task a little: rounding must not count as a response.
    deltas = spectral.orthogonal_tasks(tasks=4)
    if stored != "factors":
        deltas = spectral.as_dense(deltas, torch.float32 if stored == "float32" else torch.float64)
    expected = alpha * sum(matrices(deltas))
    found = spectral.merged(Pipeline.of([TaskArithmetic(alpha=alpha), Svc(alpha=1.0)]), deltas)
    spectral.assert_close(found, expected, deltas, times=8)


def test_a_direction_that_few_tasks_have_is_kept_and_one_that_all_have_is_lowered():
    Q, P = samples.orthogonal(6, seed=1), samples.orthogonal(5, seed=2)

    def task(first, own, place):
        S = np.zeros((6, 5))
        S[0, 0], S[place, place] = first, own
        return Dense(torch.from_numpy(Q @ S @ P.T))

    deltas = [task(3.0, 2.0, 1), task(3.0, 1.5, 2)]
    merged = spectral.merge(TaskArithmetic(alpha=1.0), deltas)
    found = Q.T @ calibrate(Svc(alpha=1.0), merged, deltas) @ P
    expected = np.zeros((6, 5))
    expected[0, 0], expected[1, 1], expected[2, 2] = 3.0, 2.0, 1.5
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_small_direction_that_two_tasks_share_is_lowered_too():
    Q, P = samples.orthogonal(6, seed=1), samples.orthogonal(5, seed=2)

    def task(first, own, place):
        S = np.zeros((6, 5))
        S[0, 0], S[place, place] = first, own
        return Dense(torch.from_numpy(Q @ S @ P.T))

    deltas = [task(1e-4, 2.0, 1), task(1e-4, 1.5, 2)]
    merged = Dense(sum(delta.tensor for delta in deltas))
    found = Q.T @ calibrate(Svc(alpha=1.0), merged, deltas) @ P
    assert found[0, 0] == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32])
def test_orthogonal_tasks_of_many_sizes_stay(stored):
    plain = spectral.orthogonal_tasks(tasks=3)
    sizes = [delta.scaled(10.0 ** (-2 * t)) for t, delta in enumerate(plain)]
    deltas = spectral.as_dense(sizes, stored)
    found = spectral.merged(Pipeline.of([TaskArithmetic(alpha=0.7), Svc(alpha=1.0)]), deltas)
    for delta in plain:
        left, right = (delta.B / delta.B.norm(dim=0)).numpy(), delta.A.numpy()
        before = 0.7 * np.diag(left.T @ sum(map(samples.exact, deltas)) @ right.T)
        after = np.diag(left.T @ found @ right.T)
        np.testing.assert_allclose(after, before, rtol=1e-3)


def test_the_steps_own_deltas_are_not_weighted():
    deltas = samples.task_deltas("low-rank", 30, 20)
    merged = spectral.merge("task_arithmetic", deltas)
    plain = calibrate(Svc(), merged, deltas)
    weighted = calibrate(Svc(), merged, deltas, weights=(1.0, 2.0, 3.0, 4.0))
    np.testing.assert_array_equal(plain, weighted)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_tasks_without_a_delta_do_not_respond(alpha):
    first, second = samples.low_rank(30, 20, 3, seed=1), samples.low_rank(30, 20, 3, seed=2)
    found = spectral.merged(
        Pipeline.of([TaskArithmetic(), Svc(alpha=alpha)]), [first, None, second]
    )
    merged = spectral.merge(TaskArithmetic(), [first, None, second])
    tau = [samples.exact(first), np.zeros((30, 20)), samples.exact(second)]
    expected = svc.svc(samples.exact(merged), tau, alpha)
    spectral.assert_close(found, expected, [first, second])
    zero = spectral.zero(30, 20)
    again = calibrate(Svc(alpha=alpha), merged, [first, zero, second])
    spectral.assert_close(again, expected, [first, second])


@pytest.mark.parametrize("kind", samples.KINDS)
def test_rotations_and_scale_carry_over(kind):
    m, n = 14, 11
    deltas = samples.task_deltas(kind, m, n)
    merged = spectral.merge(TaskArithmetic(alpha=0.5), deltas)
    expected = calibrate(Svc(), merged, deltas)
    left, right = samples.orthogonal(m, seed=1), samples.orthogonal(n, seed=2)
    turned = [samples.rotated(delta, left, right) for delta in deltas]
    found = calibrate(Svc(), samples.rotated(merged, left, right), turned)
    spectral.assert_close(found, left @ expected @ right, deltas, times=2, condition=1e6)
    scaled = calibrate(Svc(), merged.scaled(-8.0), [delta.scaled(-8.0) for delta in deltas])
    spectral.assert_close(scaled / -8.0, expected, deltas, times=2, condition=1e6)


ZEROS = [
    [LowRank(torch.zeros(6, 2), torch.ones(2, 5))] * 2,
    [Dense(torch.zeros(6, 5))] * 3,
    [LowRank(torch.zeros(6, 9), torch.ones(9, 5))] * 2,
]


@pytest.mark.parametrize("zeros", ZEROS)
def test_zeros_stay_zero(zeros):
    assert not spectral.merged("task_arithmetic+svc", zeros).any()
    found = calibrate(Svc(), samples.dense(6, 5), zeros)
    # Nothing answers: every γ is T/(T α), which is T for α = 1/T.
    expected = len(zeros) * samples.exact(samples.dense(6, 5))
    spectral.assert_close(found, expected, [samples.dense(6, 5)])


@pytest.mark.parametrize(
    "deltas", [spectral.shared_A(), spectral.parallel_columns(), [samples.low_rank(5, 4, 9)] * 2]
)
@pytest.mark.parametrize("merge", MERGES)
def test_rank_deficient_deltas_give_numbers(deltas, merge):
    for stored in (deltas, spectral.as_dense(deltas, torch.float32)):
        assert np.all(np.isfinite(spectral.merged(f"{merge}+svc", stored)))


def test_vectors_and_embeddings_are_left_as_they_are():
    vectors = [{"bias": samples.dense(5, seed=t)} for t in range(3)]
    expected = merge_state(vectors, "task_arithmetic")["bias"]
    found = merge_state(vectors, "task_arithmetic+svc")["bias"]
    assert torch.equal(found.tensor, expected.tensor)
    deltas = samples.task_deltas("dense")
    merged = spectral.merge("task_arithmetic", deltas)
    found = calibrate(Svc(), merged, deltas, is_embedding=True)
    np.testing.assert_array_equal(found, samples.exact(merged))


@pytest.mark.parametrize("merge", [IsoC(), IsoCts()])
@pytest.mark.parametrize("between", ["", "+scale", "+own_response"])
def test_flat_spectra_are_refused(merge, between):
    with pytest.raises(UsageError, match=f"svc: all singular values of what {merge.name} makes"):
        make_pipeline(f"{merge.name}{between}+svc")
    with pytest.raises(UsageError, match=merge.name):
        Pipeline.of([merge, Svc()])


def test_a_step_before_the_flat_spectrum_is_none_after_it():
    assert make_pipeline("star+iso_c+own_response").merge == IsoC()
    assert make_pipeline("tsv_m+svc+own_response").post_steps[0] == Svc()


@pytest.mark.parametrize("alpha", [0, -1])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(UsageError, match="alpha"):
        make_pipeline("average+svc", {"svc.alpha": alpha})
