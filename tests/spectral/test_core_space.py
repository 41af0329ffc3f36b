"""Core Space: the same deltas in small orthonormal bases, and every spectral merge in it."""

import numpy as np
import pytest
import torch
from hypothesis import given

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import Ace, Cart, Covariance, IsoC, IsoCts, TsvM
from starmerge_models.spectral import core_space
from starmerge_models.spectral.core_space import FLOAT32_NOISE, FLOAT64_NOISE
from tests.oracles import bounds, samples, spectral

MERGES = [
    TsvM(),
    TsvM(triplets="all"),
    IsoC(),
    IsoCts(),
    IsoCts(common=0.3),
    Cart(),
    Cart(rank=2),
    Covariance(side="input"),
    Covariance(side="output"),
    Covariance(ridge=0.0, side="input"),
    Ace(),
]


def names(method):
    return repr(method)


def whole(basis, length):
    """The basis as a matrix: None stands for the coordinates there are."""
    return np.eye(length) if basis is None else basis.numpy()


def assert_is_core_space(deltas):
    """The bases are orthonormal, and the small matrices are the deltas in them."""
    space = core_space(deltas)
    m, n = deltas[0].shape
    assert space.shape == (m, n)
    U, V = whole(space.U, m), whole(space.V, n)
    roundings = bounds.gamma(8 * (m + n), bounds.U64)
    for basis in (U, V):
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=roundings, rtol=0)
    assert len(space.matrices) == len(deltas)
    for C, delta in zip(space.matrices, deltas, strict=True):
        assert C.dtype == torch.float64
        error = np.linalg.norm(U @ C.numpy() @ V.T - samples.exact(delta))
        assert error <= roundings * np.linalg.norm(bounds.magnitude(delta))
    return space


@samples.SEARCH
@given(samples.task_lists())
def test_the_matrices_are_the_deltas_in_orthonormal_bases(deltas):
    assert_is_core_space(deltas)


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), spectral.SHAPES)
def test_every_shape_kind_and_dtype(m, n, kind, dtype):
    assert_is_core_space(samples.task_deltas(kind, m, n, dtype=dtype))


@pytest.mark.parametrize(
    ("m", "n", "core"),
    [
        (30, 20, (16, 16)),
        (12, 40, (12, 16)),
        (40, 12, (16, 12)),
        (9, 7, (9, 7)),
        (16, 17, (16, 16)),
    ],
)
def test_a_side_shorter_than_the_ranks_together_keeps_its_coordinates(m, n, core):
    space = core_space(samples.task_deltas("low-rank", m, n))
    assert space.matrices[0].shape == core
    assert (space.U is None, space.V is None) == (m <= 16, n <= 16)


def test_one_dense_delta_keeps_the_coordinates_there_are():
    space = core_space(samples.task_deltas("mixed", 30, 20))
    assert space.U is None
    assert space.V is None
    assert space.matrices[0].shape == (30, 20)


def test_the_noise_is_that_of_the_coarsest_delta():
    low, full = samples.low_rank(30, 20, 2), samples.dense(30, 20)
    assert core_space([low, low]).noise == FLOAT64_NOISE
    assert core_space([low, Dense(full.tensor.double())]).noise == FLOAT64_NOISE
    assert core_space([low, full]).noise == FLOAT32_NOISE
    assert core_space([Dense(full.tensor.double()), full]).noise == FLOAT32_NOISE
    assert core_space([low, samples.dense(30, 20, dtype=torch.bfloat16)]).noise == FLOAT32_NOISE


def test_the_floor_is_a_share_of_all_norms():
    deltas = samples.task_deltas("low-rank", 30, 20)
    norms = sum(np.linalg.norm(samples.exact(delta)) for delta in deltas)
    assert core_space(deltas).floor == pytest.approx(FLOAT64_NOISE * norms, rel=1e-12)


@pytest.mark.parametrize(("m", "n"), spectral.SHAPES)
def test_a_matrix_of_the_space_becomes_a_delta_of_its_shorter_rank(m, n):
    deltas = samples.task_deltas("low-rank", m, n)
    space = core_space(deltas)
    C = sum(space.matrices)
    delta = space.delta(C)
    assert delta.shape == (m, n)
    assert delta.rank == min(C.shape)
    assert isinstance(delta, Dense if min(C.shape) == min(m, n) else LowRank)
    if isinstance(delta, LowRank):
        assert delta.B.dtype == delta.A.dtype == torch.float32
    expected = sum(map(samples.exact, deltas))
    spectral.assert_close(samples.exact(delta), expected, deltas)


def test_deltas_of_different_shapes_are_refused():
    with pytest.raises(UsageError, match="no common shape"):
        core_space([samples.low_rank(4, 5, 1), samples.low_rank(5, 4, 1)])
    with pytest.raises(UsageError, match="no common shape"):
        core_space([])


@pytest.mark.parametrize("others", [[], [samples.low_rank(8, 6, 2)], [samples.dense(8, 6)]])
def test_terms_that_cancel_leave_exactly_zero(others):
    B = torch.tensor([[0.1, 0.2, -0.3]]) * samples.normal(8, 1, seed=1)
    A = torch.tensor([[0.7], [0.7], [0.7]]) * samples.normal(1, 6, seed=2)
    cancelling = LowRank(torch.cat([B, -B], 1), torch.cat([A, A]), 3.0)
    space = core_space([cancelling, *others])
    assert not space.matrices[0].any()
    assert all(C.any() for C in space.matrices[1:])


def test_terms_that_nearly_cancel_leave_their_difference():
    B, A = samples.normal(8, 1, seed=1), samples.normal(1, 6, seed=2)
    delta = LowRank(torch.cat([B, -B * (1 - 2.0**-20)], 1), torch.cat([A, A]))
    space = assert_is_core_space([delta])
    assert space.matrices[0].any()


@pytest.mark.parametrize("scale", [1e-30, -1e-15, 1e15])
@pytest.mark.parametrize("others", [[], [samples.dense(9, 8)]])
def test_a_small_scale_does_not_count_as_cancelling(scale, others):
    space = assert_is_core_space([samples.low_rank(9, 8, 3, scale=scale), *others])
    assert space.matrices[0].any()


@pytest.mark.parametrize("imbalance", [1e3, 1e9])
def test_badly_balanced_factors_do_not_count_as_cancelling(imbalance):
    plain = samples.low_rank(9, 8, 3, seed=3)
    factors = torch.tensor([imbalance, 1.0, 1.0 / imbalance], dtype=torch.float64)
    skewed = LowRank(plain.B.double() * factors, plain.A.double() / factors[:, None])
    assert_is_core_space([skewed])
    assert_is_core_space([skewed, samples.low_rank(9, 8, 1)])
    assert core_space([skewed]).matrices[0].any()


def test_deltas_of_scales_1e_minus_6_and_1e6_keep_their_digits():
    assert_is_core_space(
        [samples.low_rank(30, 20, 3, seed=s, scale=10.0**e) for s, e in ((1, -6), (2, 6))]
    )


@pytest.mark.parametrize("method", MERGES, ids=names)
@pytest.mark.parametrize(("m", "n"), spectral.SHAPES)
def test_adapters_merge_as_their_matrices_do(m, n, method):
    deltas = samples.task_deltas("low-rank", m, n)
    found = spectral.merged(method, deltas)
    expected = spectral.merged(method, spectral.as_dense(deltas))
    spectral.assert_close(found, expected, deltas, times=2)


@pytest.mark.parametrize("method", MERGES, ids=names)
@pytest.mark.parametrize(
    "deltas",
    [spectral.shared_A(), spectral.orthogonal_tasks(), spectral.parallel_columns()],
    ids=["shared A", "orthogonal", "parallel columns"],
)
def test_rank_deficient_adapters_merge_as_their_matrices_do(deltas, method):
    found = spectral.merged(method, deltas)
    expected = spectral.merged(method, spectral.as_dense(deltas))
    spectral.assert_close(found, expected, deltas, times=2, condition=1e6)


@pytest.mark.parametrize("method", MERGES[:-2], ids=names)
@pytest.mark.parametrize(
    "deltas",
    [spectral.shared_A(), spectral.shared_A(tasks=3, r=8), spectral.parallel_columns()],
    ids=["shared A", "shared A of a higher rank", "parallel columns"],
)
def test_directions_that_rounding_to_float32_adds_are_not_raised(deltas, method):
    found = spectral.merged(method, spectral.as_dense(deltas, torch.float32))
    expected = spectral.merged(method, deltas)
    # The deltas themselves move by u; a condition of 1e2 is above that of every method here.
    size = sum(np.linalg.norm(samples.exact(delta)) for delta in deltas)
    assert np.linalg.norm(found - expected) <= 1e2 * bounds.U32 * size


@pytest.mark.parametrize("method", MERGES[:-2], ids=names)
def test_a_copy_rounded_to_float32_is_a_copy(method):
    first, second = (samples.low_rank(24, 18, 4, seed=t) for t in (1, 2))
    rounded = [first, *spectral.as_dense([first, second], torch.float32)]
    found = spectral.merged(method, rounded)
    expected = spectral.merged(method, [first, first, second])
    size = sum(np.linalg.norm(samples.exact(delta)) for delta in rounded)
    assert np.linalg.norm(found - expected) <= 1e2 * bounds.U32 * size
