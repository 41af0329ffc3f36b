"""What all spectral merges have in common."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.methods import Ace, Cart, Covariance, Ctm, DcMerge, IsoC, IsoCts, Knots, TsvM
from starmerge_models.methods.kinds.spectral import SpectralMerge
from starmerge_models.methods.memory import DeltaShape, TensorShape
from tests.oracles import bounds, linear, samples, spectral
from tests.products import one_in

TSV = [TsvM(), TsvM(triplets="all"), TsvM(triplets=2, alpha=0.7)]
ISO = [IsoC(), IsoCts()]
CART = [Cart(), Cart(rank=0.4), Cart(rank=2, lambda_=0.5)]
COVARIANCE = [Covariance(side="input"), Covariance(side="output"), Covariance(ridge=0.01)]
DC = [DcMerge(), DcMerge(smoothing="linear", k=20), DcMerge(smoothing="none", triplets="share")]
CTM = [Ctm(), Ctm(rank=3), Ctm(rank=5, beta=0.0, rule="sum")]
KNOTS = [Knots(k=40), Knots(k=100), Knots(k=40, on="sv", scope="local")]

HOMOGENEOUS = [*TSV, *ISO, *CART, *COVARIANCE, *DC, *CTM]
ROTATED = HOMOGENEOUS
TRANSPOSED = [*TSV, IsoC(), *CART, Covariance(), *DC]
ALL = [*HOMOGENEOUS, Ace(), *KNOTS]

LEFT_ALONE = [*TSV, *ISO, *COVARIANCE, *DC, *CTM, Ace(), *KNOTS]
"""Methods in which a task that leaves a tensor alone takes no share of it."""


def names(method):
    return repr(method)


def one_zero(deltas):
    m, n = deltas[0].shape
    return [deltas[0], spectral.zero(m, n), *deltas[1:]]


@pytest.mark.parametrize("method", ALL, ids=names)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_order_of_the_tasks_does_not_matter(kind, method):
    deltas = samples.task_deltas(kind, 30, 20)
    weights = [1.0, 0.5, 2.0, 1.0]
    expected = spectral.merged(method, deltas, weights)
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        found = spectral.merged(method, [deltas[t] for t in order], [weights[t] for t in order])
        spectral.assert_close(found, expected, deltas, times=4)


@pytest.mark.parametrize("factor", [2.0**-20, 8.0, -1.0, 1e6])
@pytest.mark.parametrize("method", [*HOMOGENEOUS, *KNOTS], ids=names)
def test_scaling_the_deltas_scales_the_result(method, factor):
    deltas = samples.task_deltas("low-rank", 30, 20)
    found = spectral.merged(method, [delta.scaled(factor) for delta in deltas])
    expected = spectral.merged(method, deltas)
    spectral.assert_close(found / factor, expected, deltas, times=4)


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("method", ALL, ids=names)
def test_opposite_deltas_give_the_opposite_result(method, kind):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(method, [delta.scaled(-1.0) for delta in deltas])
    spectral.assert_close(-found, spectral.merged(method, deltas), deltas, times=4)


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("method", ROTATED, ids=names)
def test_an_orthogonal_change_of_basis_carries_over(method, kind):
    m, n = 14, 11
    deltas = samples.task_deltas(kind, m, n)
    left, right = samples.orthogonal(m, seed=1), samples.orthogonal(n, seed=2)
    found = spectral.merged(method, [samples.rotated(delta, left, right) for delta in deltas])
    expected = left @ spectral.merged(method, deltas) @ right
    spectral.assert_close(found, expected, deltas, times=2)


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("method", KNOTS, ids=names)
def test_knots_follows_rotations_of_the_outputs(method, kind):
    m, n = 14, 11
    deltas = samples.task_deltas(kind, m, n)
    left = samples.orthogonal(m, seed=1)
    found = spectral.merged(method, [samples.rotated(delta, left, np.eye(n)) for delta in deltas])
    spectral.assert_close(found, left @ spectral.merged(method, deltas), deltas, times=4)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_ace_follows_permutations_of_rows_and_columns(kind):
    m, n = 14, 11
    deltas = samples.task_deltas(kind, m, n)
    left, right = np.eye(m)[::-1].copy(), np.roll(np.eye(n), 3, axis=0)
    found = spectral.merged(Ace(), [samples.rotated(delta, left, right) for delta in deltas])
    expected = left @ spectral.merged(Ace(), deltas) @ right
    spectral.assert_close(found, expected, deltas, times=2)


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("method", TRANSPOSED, ids=names)
def test_transposing_the_deltas_transposes_the_result(method, kind):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(method, list(map(samples.transposed, deltas)))
    spectral.assert_close(found.T, spectral.merged(method, deltas), deltas, times=2)


@pytest.mark.parametrize("method", LEFT_ALONE, ids=names)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), [(9, 7), (30, 20)])
def test_a_task_that_leaves_the_tensor_alone_changes_nothing(m, n, kind, method):
    deltas = samples.task_deltas(kind, m, n)
    expected = spectral.merged(method, deltas)
    for extended in ([*deltas[:2], None, *deltas[2:]], one_zero(deltas)):
        found = spectral.merged(method, extended)
        spectral.assert_close(found, expected, deltas, times=4)


@pytest.mark.parametrize("method", CART, ids=names)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_cart_counts_a_task_without_a_delta_as_one_of_zero(kind, method):
    deltas = samples.task_deltas(kind, 30, 20)
    absent = spectral.merged(method, [deltas[0], None, *deltas[1:]])
    spectral.assert_close(spectral.merged(method, one_zero(deltas)), absent, deltas, times=2)
    assert np.linalg.norm(absent - spectral.merged(method, deltas)) > 0.01 * np.linalg.norm(absent)


@pytest.mark.parametrize("method", LEFT_ALONE, ids=names)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_a_weight_of_zero_takes_a_task_out(kind, method):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(method, deltas, [1.0, 0.0, 2.0, 1.0])
    expected = spectral.merged(method, [deltas[0], *deltas[2:]], [1.0, 2.0, 1.0])
    spectral.assert_close(found, expected, deltas, times=4)


ZEROS = [
    [LowRank(torch.zeros(6, 2), torch.ones(2, 5))] * 3,
    [LowRank(torch.ones(6, 2), torch.ones(2, 5), 0.0)] * 2,
    [Dense(torch.zeros(6, 5))] * 3,
    [Dense(torch.zeros(6, 5)), LowRank(torch.zeros(6, 2), torch.ones(2, 5))],
    [LowRank(torch.zeros(6, 9), torch.ones(9, 5))] * 2,
    [Dense(torch.zeros(6, 5))],
    [LowRank(torch.full((6, 2), 0.1), torch.tensor([[0.3], [-0.3]]).repeat(1, 5))] * 2,
]


@pytest.mark.parametrize("method", ALL, ids=names)
@pytest.mark.parametrize("zeros", ZEROS)
def test_zeros_stay_zero(zeros, method):
    found = spectral.merged(method, zeros)
    assert found.shape == (6, 5)
    assert not found.any()


@pytest.mark.parametrize("method", ALL, ids=names)
def test_tasks_that_cancel_leave_no_more_than_rounding(method):
    delta = samples.low_rank(9, 7, 2)
    for pair in ([delta, delta.scaled(-1.0)], spectral.as_dense([delta, delta.scaled(-1.0)])):
        found = spectral.merged(method, pair)
        assert np.all(np.isfinite(found))
        if isinstance(method, IsoC | Cart | Covariance):
            assert np.linalg.norm(found) <= 1e-13 * np.linalg.norm(samples.exact(delta))


DEFICIENT = {
    "shared A": spectral.shared_A(),
    "shared A in bfloat16": spectral.shared_A(dtype=torch.bfloat16),
    "parallel columns": spectral.parallel_columns(),
    "one adapter many times": [samples.low_rank(24, 18, 4, seed=5)] * 6,
    "ranks beyond the matrix": [samples.low_rank(5, 4, 9, seed=t) for t in range(3)],
    "one row": [samples.low_rank(1, 8, 3, seed=t) for t in range(3)],
    "one column": [samples.low_rank(8, 1, 3, seed=t) for t in range(3)],
    "equal rows": [LowRank(torch.ones(8, 1), samples.normal(1, 6, seed=t)) for t in range(3)],
    "integers": [samples.low_rank(6, 6, 3, seed=t, entries=samples.integers) for t in range(4)],
    "1e-6 beside 1e6": [samples.low_rank(24, 18, 3, seed=1, scale=10.0**e) for e in (-6, 6)],
}


@pytest.mark.parametrize(
    ("name", "method", "stored"),
    one_in(2, list(DEFICIENT), ALL, [torch.float32, None]),
)
def test_rank_deficient_deltas_give_numbers(name, method, stored):
    deltas = DEFICIENT[name]
    deltas = deltas if stored is None else spectral.as_dense(deltas, stored)
    for extended in (deltas, one_zero(deltas)):
        found = spectral.merged(method, extended)
        assert np.all(np.isfinite(found))
        size = sum(np.linalg.norm(samples.exact(delta)) for delta in deltas)
        # No method but ACE, whose refinement has no bound, makes more than four times what it gets.
        assert np.linalg.norm(found) <= (100 if isinstance(method, Ace) else 4) * size


@samples.SEARCH
@given(samples.task_lists(), st.sampled_from(ALL))
def test_whatever_is_merged_has_the_shape_and_is_finite(deltas, method):
    assume(samples.exact(deltas[0]).size > 0)
    found = spectral.merged(method, deltas)
    assert found.shape == deltas[0].shape
    assert np.all(np.isfinite(found))


@pytest.mark.parametrize("shape", [(5,), ()])
@pytest.mark.parametrize("method", ALL, ids=names)
def test_vectors_and_scalars_are_averaged(method, shape):
    deltas = [samples.dense(*shape, seed=t) for t in range(3)]
    found = spectral.merged(method, deltas)
    expected = linear.average([samples.exact(delta) for delta in deltas])
    assert np.all(np.abs(found - expected) <= bounds.weighted_sum(deltas, 1 / 3))


@pytest.mark.parametrize("method", ALL, ids=names)
def test_an_average_divides_by_the_weights_of_all_tasks(method):
    first, second = samples.dense(5, seed=1), samples.dense(5, seed=2)
    found = spectral.merged(method, [first, None, second], [1.0, 4.0, 0.5])
    expected = (samples.exact(first) + 0.5 * samples.exact(second)) / 5.5
    assert np.all(np.abs(found - expected) <= bounds.weighted_sum([first, second], 1 / 5))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 3)])
@pytest.mark.parametrize("method", ALL, ids=names)
def test_empty_tensors(method, shape):
    deltas = [Dense(torch.zeros(shape))] * 2
    assert spectral.merged(method, deltas).shape == deltas[0].shape


@pytest.mark.parametrize("shape", [(6, 3, 2, 2), (4, 5, 3), (1, 3, 2, 2)])
@pytest.mark.parametrize("method", ALL, ids=names)
def test_kernels_are_merged_as_matrices(method, shape):
    deltas = [samples.dense(*shape, seed=t) for t in range(3)]
    found = spectral.merged(method, deltas)
    assert found.shape == (shape[0], int(np.prod(shape[1:])))
    matrices = [Dense(delta.matrix) for delta in deltas]
    np.testing.assert_array_equal(found, spectral.merged(method, matrices))


def in_context(method, deltas, **given):
    context = spectral.context(deltas, **given)
    return samples.exact(method.merge(spectral.given(deltas), context, None))


@pytest.mark.parametrize("kind", ["dense", "mixed"])
@pytest.mark.parametrize(
    "kind_of_merge", [TsvM, DcMerge, Ctm, IsoC, IsoCts, Cart, Covariance, Ace, Knots]
)
def test_embeddings_of_full_finetunes_are_averaged(kind_of_merge, kind):
    deltas = samples.task_deltas(kind)
    method = kind_of_merge(scope="local") if kind_of_merge is Knots else kind_of_merge()
    found = in_context(method, deltas, is_embedding=True)
    expected = linear.average([samples.exact(delta) for delta in deltas])
    assert np.all(np.abs(found - expected) <= bounds.weighted_sum(deltas, 1 / 4))


@pytest.mark.parametrize("kind_of_merge", [TsvM, DcMerge, Ctm, IsoC, IsoCts, Cart, Covariance, Ace])
def test_embeddings_are_merged_on_request_and_those_of_adapters_always(kind_of_merge):
    full, factored = samples.task_deltas("dense"), samples.task_deltas("low-rank")
    found = in_context(kind_of_merge(embeddings="merge"), full, is_embedding=True)
    np.testing.assert_array_equal(found, in_context(kind_of_merge(), full))
    found = in_context(kind_of_merge(), factored, is_embedding=True)
    np.testing.assert_array_equal(found, in_context(kind_of_merge(), factored))


@pytest.mark.parametrize("method", ALL, ids=names)
def test_adapters_stay_factored(method):
    found = spectral.merge(method, samples.task_deltas("low-rank", 30, 20))
    assert isinstance(found, LowRank)
    assert found.rank <= 17
    assert found.B.dtype == found.A.dtype == torch.float32


class SumOfMatrices(SpectralMerge):
    """A method as others write them: it sees a list of matrices, whatever the task vectors are."""

    def merge_matrices(self, tau, weights, space, tensor):
        assert isinstance(tau, list)
        for tau_t in tau:
            assert isinstance(tau_t, torch.Tensor)
            assert tau_t.dtype == torch.float64
        assert len(tau) == len(weights)
        return sum(tau)


@pytest.mark.parametrize(("m", "n"), spectral.SHAPES)
def test_a_method_of_matrices_gets_them_of_many_adapters_too(m, n):
    """The ranks add up to more than both sides; a zero task vector is not among them."""
    deltas = one_zero([samples.low_rank(m, n, 2, seed=t) for t in range(30)])
    found = in_context(SumOfMatrices(), deltas)
    spectral.assert_close(found, sum(map(samples.exact, deltas)), deltas)
    tensor = TensorShape((m, n), False, (DeltaShape(2),) * 31, tasks=31)
    assert SumOfMatrices().memory(tensor) >= 31 * 8 * m * n
