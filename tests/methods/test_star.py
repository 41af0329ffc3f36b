"""STAR against its float64 reference, and the properties that define it."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from starmerge_models import merge_state
from starmerge_models.deltas import Dense, LowRank, Stored
from starmerge_models.errors import UsageError
from starmerge_models.methods import Average, Star
from tests.merge_one import merge_one as merge
from tests.oracles import bounds, linear, samples, star
from tests.oracles import deltas as oracle


def bound(deltas, ranks, tasks=None):
    """Frobenius error of the mean: of each truncation, and of a sum of sum(ranks) products."""
    total = 0.0
    for delta, r in zip(deltas, ranks, strict=True):
        sigma = oracle.singular_values(samples.exact(delta))
        total += bounds.truncation(delta, sigma, r)
        total += bounds.gamma(sum(ranks) + 7, bounds.U32) * float(np.sum(sigma))
    return total / (tasks or len(deltas))


def assert_is_star(merged, deltas, *, eta=None, rank=None, tasks=None):
    """The merged delta is the reference's, at the ranks that the rule gives."""
    matrices = [samples.exact(delta) for delta in deltas]
    ranks = [truncation.rank for truncation in merged.truncations]
    for delta, matrix, r in zip(deltas, matrices, ranks, strict=True):
        sigma = oracle.singular_values(matrix)
        if bounds.is_rounding(delta, sigma):
            continue
        if rank is None:
            assert r in star.admissible_ranks(sigma, eta, slack=1e-9)
        else:
            assert r == min(rank, np.linalg.matrix_rank(matrix))
    expected = sum(map(star.truncated, matrices, ranks)) / (tasks or len(deltas))
    difference = oracle.frobenius(samples.values(merged.delta) - expected)
    assert difference <= bound(deltas, ranks, tasks)


@pytest.mark.parametrize("parameters", [{"eta": 40}, {"eta": 80}, {"rank": 1}, {"rank": 3}])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), [(9, 7), (5, 16)])
def test_star_is_the_reference(m, n, kind, dtype, parameters):
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    merged = merge(Star(**parameters), deltas)
    expected = star.star([samples.exact(delta) for delta in deltas], **parameters)
    ranks = [truncation.rank for truncation in merged.truncations]
    difference = oracle.frobenius(samples.values(merged.delta) - expected)
    assert difference <= bound(deltas, ranks)
    assert_is_star(merged, deltas, **parameters)


@pytest.mark.parametrize("parameters", [{"eta": 10}, {"eta": 40}, {"eta": 90}, {"rank": 7}])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize(("m", "n"), [(140, 130), (130, 300)])
def test_deltas_large_enough_for_the_fast_decomposition(m, n, dtype, parameters):
    deltas = samples.task_deltas("mixed", m, n, dtype=dtype)
    assert_is_star(merge(Star(**parameters), deltas), deltas, **parameters)


@samples.SEARCH
@given(samples.task_lists(), st.sampled_from([1.0, 25.0, 40.0, 77.7, 100.0]))
def test_star_by_eta(deltas, eta):
    merged = merge(Star(eta=eta), deltas)
    assert torch.isfinite(merged.delta.to_dense()).all()
    for delta, truncation in zip(deltas, merged.truncations, strict=True):
        sigma = oracle.singular_values(samples.exact(delta))
        assume(bounds.gap(sigma, truncation.rank) > 1e-4)
    assert_is_star(merged, deltas, eta=eta)


@samples.SEARCH
@given(samples.task_lists(), st.integers(1, 10))
def test_star_by_rank(deltas, rank):
    merged = merge(Star(rank=rank), deltas)
    for delta in deltas:
        matrix = samples.exact(delta)
        r = min(rank, np.linalg.matrix_rank(matrix))
        assume(bounds.gap(oracle.singular_values(matrix), r) > 1e-4)
    assert_is_star(merged, deltas, rank=rank)


def test_the_default_keeps_40_percent_of_the_nuclear_norm():
    deltas = samples.task_deltas("mixed")
    ranks = [truncation.rank for truncation in merge(Star(), deltas).truncations]
    sigmas = [oracle.singular_values(samples.exact(delta)) for delta in deltas]
    assert ranks == [star.kept_rank(sigma, 40.0) for sigma in sigmas]


@pytest.mark.parametrize("eta", [5, 40, 90, 100])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_nuclear_norm_of_each_task_is_restored(kind, eta):
    for delta in samples.task_deltas(kind):
        merged = merge(Star(eta=eta), [delta])
        nuclear = oracle.nuclear(samples.exact(delta))
        assert merged.delta.nuclear() == pytest.approx(
            nuclear, rel=bounds.gamma(4, bounds.U32), abs=0
        )
        (truncation,) = merged.truncations
        assert truncation.nuclear_before == pytest.approx(nuclear, rel=1e-12)
        assert truncation.nuclear_after == pytest.approx(nuclear, rel=1e-12)


@pytest.mark.parametrize("eta", [1, 20, 40, 60, 80, 99])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_rank_is_the_smallest_that_suffices(kind, eta):
    deltas = samples.task_deltas(kind, 20, 15)
    for delta, truncation in zip(deltas, merge(Star(eta=eta), deltas).truncations, strict=True):
        sigma = oracle.singular_values(samples.exact(delta))
        share = 100 * np.cumsum(sigma) / np.sum(sigma)
        assert share[truncation.rank - 1] >= eta
        assert truncation.rank == 1 or share[truncation.rank - 2] < eta


@pytest.mark.parametrize("parameters", [{"eta": 40}, {"rank": 2}])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_transposing_the_deltas_transposes_the_result(kind, parameters):
    deltas = samples.task_deltas(kind)
    merged = merge(Star(**parameters), deltas)
    transposed = merge(Star(**parameters), map(samples.transposed, deltas))
    ranks = [truncation.rank for truncation in merged.truncations]
    assert [truncation.rank for truncation in transposed.truncations] == ranks
    difference = samples.values(transposed.delta).T - samples.values(merged.delta)
    assert oracle.frobenius(difference) <= 2 * bound(deltas, ranks)


@pytest.mark.parametrize("parameters", [{"eta": 40}, {"rank": 2}])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_an_orthogonal_change_of_basis_carries_over(kind, parameters):
    deltas = samples.task_deltas(kind)
    left, right = samples.orthogonal(9, seed=1), samples.orthogonal(7, seed=2)
    merged = merge(Star(**parameters), deltas)
    rotated = merge(Star(**parameters), [samples.rotated(delta, left, right) for delta in deltas])
    ranks = [truncation.rank for truncation in merged.truncations]
    assert [truncation.rank for truncation in rotated.truncations] == ranks
    difference = samples.values(rotated.delta) - left @ samples.values(merged.delta) @ right
    assert oracle.frobenius(difference) <= 2 * bound(deltas, ranks)


@pytest.mark.parametrize("copies", [2, 3, 7])
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_copies_of_one_model_give_its_truncation(kind, copies):
    delta = samples.task_deltas(kind)[-1]
    alone = merge(Star(), [delta])
    ranks = [alone.truncations[0].rank] * copies
    merged = merge(Star(), [delta] * copies)
    difference = samples.values(merged.delta) - samples.values(alone.delta)
    assert oracle.frobenius(difference) <= 2 * bound([delta] * copies, ranks)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_order_of_the_tasks_does_not_matter(kind):
    deltas = samples.task_deltas(kind)
    merged = merge(Star(), deltas)
    ranks = [truncation.rank for truncation in merged.truncations]
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        permuted = merge(Star(), [deltas[i] for i in order])
        assert [truncation.rank for truncation in permuted.truncations] == [ranks[i] for i in order]
        difference = samples.values(permuted.delta) - samples.values(merged.delta)
        assert oracle.frobenius(difference) <= 2 * bound(deltas, ranks)


@pytest.mark.parametrize("factor", [2.0, -1.0, 1e-6, -1e6])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_scaling_the_deltas_scales_the_result(kind, factor):
    deltas = [
        delta.scaled(1.0) if isinstance(delta, LowRank) else Dense(delta.tensor.double())
        for delta in samples.task_deltas(kind)
    ]
    merged = merge(Star(), deltas)
    scaled = merge(Star(), [delta.scaled(factor) for delta in deltas])
    ranks = [truncation.rank for truncation in merged.truncations]
    assert [truncation.rank for truncation in scaled.truncations] == ranks
    difference = samples.values(scaled.delta) - factor * samples.values(merged.delta)
    assert oracle.frobenius(difference) <= 2 * abs(factor) * bound(deltas, ranks)


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_eta_100_is_the_average(kind, dtype):
    deltas = samples.task_deltas(kind, dtype=dtype)
    merged = merge(Star(eta=100), deltas)
    ranks = [truncation.rank for truncation in merged.truncations]
    assert ranks == [np.linalg.matrix_rank(samples.exact(delta)) for delta in deltas]
    expected = linear.average([samples.exact(delta) for delta in deltas])
    assert oracle.frobenius(samples.values(merged.delta) - expected) <= bound(deltas, ranks)


def test_rank_1_keeps_one_direction_of_each_task():
    merged = merge(Star(rank=1), samples.task_deltas("low-rank"))
    assert [truncation.rank for truncation in merged.truncations] == [1, 1, 1, 1]
    assert np.linalg.matrix_rank(samples.values(merged.delta), tol=1e-4) == 4


def test_the_rank_overrules_eta():
    deltas = samples.task_deltas("low-rank")
    by_rank = merge(Star(rank=2, eta=100), deltas)
    assert [truncation.rank for truncation in by_rank.truncations] == [2, 1, 2, 2]


def test_models_that_leave_the_tensor_alone_count_as_zero():
    deltas = samples.task_deltas("mixed")[:2]
    merged = merge(Star(), deltas, tasks=5)
    assert_is_star(merged, deltas, eta=40, tasks=5)


def test_the_result_of_truncated_adapters_stays_factored():
    merged = merge(Star(), samples.task_deltas("low-rank"))
    assert isinstance(merged.delta, LowRank)
    assert merged.delta.rank == sum(truncation.rank for truncation in merged.truncations)


@pytest.mark.parametrize(
    "zero",
    [
        LowRank(torch.zeros(6, 2), torch.ones(2, 5)),
        LowRank(torch.ones(6, 2), torch.ones(2, 5), 0.0),
        Dense(torch.zeros(6, 5)),
    ],
)
@pytest.mark.parametrize("parameters", [{"eta": 40}, {"eta": 100}, {"rank": 1}, {"rank": 9}])
def test_a_zero_delta_stays_zero(zero, parameters):
    merged = merge(Star(**parameters), [zero])
    assert merged.truncations[0].rank == 0
    assert merged.delta.to_dense().shape == (6, 5)
    assert not merged.delta.to_dense().any()
    other = samples.low_rank(6, 5, 3)
    both = merge(Star(**parameters), [zero, other])
    assert_is_star(both, [zero, other], **parameters)


@pytest.mark.parametrize("parameters", [{"eta": 40}, {"rank": 1}])
def test_terms_that_cancel_leave_only_rounding(parameters):
    B = torch.tensor([[2.0, 2.0, 1.0, -2.0]]).repeat(3, 1)
    A = torch.tensor([[-2.0], [2.0], [2.0], [1.0]]).repeat(1, 5)
    delta = LowRank(B, A)
    assert not samples.exact(delta).any()
    merged = merge(Star(**parameters), [delta])
    error = oracle.frobenius(samples.values(merged.delta))
    assert error <= bounds.truncation(delta, np.zeros(3), 0) < 1e-11


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_a_zero_row_stays_zero(kind):
    delta = samples.low_rank(6, 5, 3)
    delta.B[2] = 0.0
    if kind == "dense":
        delta = Dense(delta.to_dense())
    merged = merge(Star(eta=60), [delta])
    assert float(merged.delta.to_dense()[2].abs().max()) <= 1e-14
    assert_is_star(merged, [delta], eta=60)


@pytest.mark.parametrize("shape", [(5,), ()])
@pytest.mark.parametrize("parameters", [{"eta": 40}, {"rank": 1}, {"embeddings": "merge"}])
def test_vectors_and_scalars_are_averaged(shape, parameters):
    deltas = [samples.dense(*shape, seed=seed) for seed in range(3)]
    merged = merge(Star(**parameters), deltas, shape=shape)
    assert merged.truncations == (None, None, None)
    expected = linear.average([samples.exact(delta) for delta in deltas])
    error = np.abs(samples.values(merged.delta) - expected)
    assert np.all(error <= bounds.weighted_sum(deltas, 1 / 3))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 3)])
def test_empty_tensors(shape):
    deltas = [Dense(torch.zeros(shape))] * 2
    merged = merge(Star(), deltas, shape=shape)
    assert merged.delta.to_dense().shape == deltas[0].shape


@pytest.mark.parametrize("shape", [(6, 3, 2, 2), (4, 5, 3), (1, 3, 2, 2)])
def test_kernels_are_truncated_as_matrices(shape):
    deltas = [samples.dense(*shape, seed=seed) for seed in range(3)]
    merged = merge(Star(), deltas, shape=shape)
    assert merged.delta.shape == (shape[0], int(np.prod(shape[1:])))
    assert_is_star(merged, deltas, eta=40)


def test_embeddings_of_full_finetunes_are_averaged():
    deltas = samples.task_deltas("dense")
    merged = merge(Star(), deltas, is_embedding=True)
    assert merged.truncations == (None,) * 4
    expected = linear.average([samples.exact(delta) for delta in deltas])
    error = np.abs(samples.values(merged.delta) - expected)
    assert np.all(error <= bounds.weighted_sum(deltas, 1 / 4))


@pytest.mark.parametrize("kind", samples.KINDS)
def test_embeddings_are_truncated_on_request(kind):
    deltas = samples.task_deltas(kind)
    merged = merge(Star(embeddings="merge"), deltas, is_embedding=True)
    assert_is_star(merged, deltas, eta=40)


def test_adapters_of_embeddings_are_always_truncated():
    deltas = samples.task_deltas("low-rank")
    assert_is_star(merge(Star(), deltas, is_embedding=True), deltas, eta=40)


def test_embeddings_of_both_kinds_side_by_side():
    deltas = samples.task_deltas("mixed")
    merged = merge(Star(), deltas, is_embedding=True)
    first, *averaged, last = merged.truncations
    assert averaged == [None, None]
    expected = samples.exact(deltas[1]) + samples.exact(deltas[2])
    expected += star.truncated(samples.exact(deltas[0]), first.rank)
    expected += star.truncated(samples.exact(deltas[3]), last.rank)
    sizes = [oracle.nuclear(samples.exact(delta)) for delta in deltas]
    tolerance = bounds.gamma(first.rank + last.rank + 20, bounds.U32) * sum(sizes) / 4
    assert oracle.frobenius(samples.values(merged.delta) - expected / 4) <= tolerance


@pytest.mark.parametrize("imbalance", [1e3, 1e6, 1e9])
def test_badly_balanced_factors(imbalance):
    plain = samples.low_rank(9, 8, 3, seed=3)
    factors = torch.tensor([imbalance, 1.0, 1.0 / imbalance], dtype=torch.float64)
    skewed = LowRank(plain.B.double() * factors, plain.A.double() / factors[:, None])
    assert_is_star(merge(Star(), [skewed]), [skewed], eta=40)


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_deltas_of_scales_1e_minus_6_and_1e6_side_by_side(kind):
    deltas = [samples.low_rank(9, 7, 4, seed=s, scale=10.0**e) for s, e in ((1, -6), (2, 6))]
    if kind == "dense":
        deltas = [Dense(delta.to_dense()) for delta in deltas]
    merged = merge(Star(), deltas)
    assert_is_star(merged, deltas, eta=40)
    tiny, large = merged.truncations
    assert tiny.nuclear_after == pytest.approx(oracle.nuclear(samples.exact(deltas[0])), rel=1e-12)
    assert large.nuclear_after == pytest.approx(oracle.nuclear(samples.exact(deltas[1])), rel=1e-12)


def test_the_inputs_are_left_alone():
    deltas = samples.task_deltas("mixed")
    before = [samples.exact(delta).copy() for delta in deltas]
    merge(Star(), deltas)
    merge(Star(), deltas, is_embedding=True)
    for delta, values in zip(deltas, before, strict=True):
        np.testing.assert_array_equal(samples.exact(delta), values)


def test_star_differs_from_the_average():
    deltas = samples.task_deltas("mixed")
    averaged = samples.values(merge(Average(), deltas).delta)
    difference = oracle.frobenius(samples.values(merge(Star(), deltas).delta) - averaged)
    assert difference > 0.1 * oracle.frobenius(averaged)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_eta_of_each_task(kind):
    deltas = samples.task_deltas(kind)
    etas = [20, 95, 50, 100]
    merged = merge(Star(eta=etas), deltas)
    sigmas = [oracle.singular_values(samples.exact(delta)) for delta in deltas]
    ranks = [star.kept_rank(sigma, eta) for sigma, eta in zip(sigmas, etas, strict=True)]
    assert [truncation.rank for truncation in merged.truncations] == ranks
    expected = sum(map(star.truncated, map(samples.exact, deltas), ranks)) / 4
    assert oracle.frobenius(samples.values(merged.delta) - expected) <= bound(deltas, ranks)


def test_eta_by_patterns_of_names():
    deltas = samples.task_deltas("mixed")
    states = [{"a.mlp.w": delta, "a.attn.w": delta, "b.w": delta} for delta in deltas]
    eta = {"*.mlp.*": 10, "a.*": 90, "*": 50}
    merged = merge_state(states, Star(eta=eta))
    for name, value in (("a.mlp.w", 10), ("a.attn.w", 90), ("b.w", 50)):
        alone = merge(Star(eta=value), deltas).delta
        np.testing.assert_array_equal(samples.values(merged[name]), samples.values(alone))


@pytest.mark.parametrize(
    ("eta", "message"),
    [
        ([40, 50], "eta has 2 numbers for 1 models"),
        ({"*.mlp.*": 10, "*": 40}, r"no merged tensor matches the pattern '\*\.mlp\.\*' of eta"),
        ({"w*": 10, "x": 40}, "no merged tensor matches the pattern 'x'"),
        ({"?eight": 10, "w": 40}, "no merged tensor matches the pattern 'w'"),
        ({}, "no pattern of eta matches the tensor weight"),
    ],
)
def test_etas_that_do_not_fit_are_refused(eta, message):
    with pytest.raises(UsageError, match=message):
        merge(Star(eta=eta), samples.task_deltas("dense")[:1])


@pytest.mark.parametrize("parameters", [{"eta": 40}, {"rank": 2}])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_without_rescale_the_kept_singular_values_are_left_alone(kind, parameters):
    deltas = samples.task_deltas(kind)
    merged = merge(Star(rescale=False, **parameters), deltas)
    expected, ranks = 0.0, []
    for delta, truncation in zip(deltas, merged.truncations, strict=True):
        U, sigma, Vt = np.linalg.svd(samples.exact(delta), full_matrices=False)
        r = truncation.rank
        expected = expected + (U[:, :r] * sigma[:r]) @ Vt[:r] / 4
        ranks.append(r)
        assert truncation.factor == 1.0
        assert truncation.nuclear_after == pytest.approx(float(np.sum(sigma[:r])), rel=1e-9)
    rescaled = merge(Star(**parameters), deltas)
    assert ranks == [truncation.rank for truncation in rescaled.truncations]
    assert oracle.frobenius(samples.values(merged.delta) - expected) <= bound(deltas, ranks)


def _stored(seed=0):
    """A base, an update of rank 4, and its delta out of a fine-tune stored in bfloat16."""
    base = samples.normal(96, 64, seed=seed)
    update = 0.02 * samples.low_rank(96, 64, 4, seed=seed + 1).to_dense()
    return base, update, Stored([(1.0, (base + update).bfloat16())], base)


def test_the_noise_of_a_stored_fine_tune_is_dropped_before_eta():
    base, update, delta = _stored()
    sigma = oracle.singular_values(oracle.exact(update))
    (auto,) = merge(Star(eta=99), [delta], base=base).truncations
    assert auto.rank == star.kept_rank(sigma, 99) == 4
    assert auto.nuclear_before == pytest.approx(np.sum(sigma), rel=0.01)
    assert auto.noise.applies
    assert auto.noise.above == 4
    (off,) = merge(Star(eta=99, noise_floor="off"), [delta], base=base).truncations
    assert off.noise is None
    assert off.rank > 40


def test_a_float64_fine_tune_of_weights_above_4():
    base = samples.normal(140, 131, seed=0, dtype=torch.float64)
    base[0, 0] = 4.5
    update = 0.01 * samples.normal(140, 131, seed=1, dtype=torch.float64)
    delta = Stored([(1.0, base + update)], base)
    merged = merge(Star(), [delta], base=base)
    assert_is_star(merged, [Dense(delta.tensor)], eta=40)
    noise = merged.truncations[0].noise
    assert 0 < noise.value < 1e-13
    assert noise.above == 131


def test_the_floor_is_looked_for_only_in_what_came_from_a_stored_fine_tune():
    base, _, delta = _stored()
    adapter = samples.low_rank(96, 64, 4)
    unchanged = Stored([(1.0, base)], base)
    for other in (adapter, Dense(delta.tensor), delta.scaled(2.0), unchanged):
        assert merge(Star(), [other], base=base).truncations[0].noise is None
    assert merge(Star(), [delta]).truncations[0].noise is None
