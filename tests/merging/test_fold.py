"""Adding a delta to a weight: rounded once, in any dtype, over any number of panels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.merging.fold import FOLD_ENTRIES, factors_of, fold
from tests.oracles import bounds, rounding, samples
from tests.oracles import deltas as oracle

ROWS = [1, 5, 700]
HEIGHT = 16
WIDTH = FOLD_ENTRIES // HEIGHT
"""Of a matrix that is merged in panels of HEIGHT rows."""
OUTPUTS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def threads():
    """Set torch's number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def update_error(delta):
    """Entrywise error of the delta in float32: its factors, its scale, its products and sums."""
    roundings = delta.rank + 5 if isinstance(delta, LowRank) else 1
    return bounds.gamma(roundings, bounds.U32) * bounds.magnitude(delta)


def assert_is_fold(base, delta, dtype):
    """The weight is the exact sum, rounded once; the norm and the survival are as defined."""
    folded = fold(base, delta, dtype)
    assert folded.weight.dtype == dtype
    assert folded.weight.shape == base.shape
    weight, update = oracle.as_matrix(oracle.exact(base)), samples.exact(delta)
    merged = oracle.as_matrix(oracle.exact(folded.weight))
    wide = torch.promote_types(base.dtype, torch.float32)
    exact, error = weight + update, update_error(delta)
    error = error + rounding.unit_roundoff(wide) * (np.abs(exact) + error)
    if dtype.itemsize < wide.itemsize:
        error = error + rounding.unit_roundoff(dtype) * (np.abs(exact) + error)
        error = error + rounding.smallest_step(dtype) / 2
    assert np.all(np.abs(merged - exact) <= error)

    norm, inaccuracy = oracle.frobenius(update), oracle.frobenius(update_error(delta))
    assert folded.update_norm == pytest.approx(norm, rel=1e-13, abs=inaccuracy)
    assert 0.0 <= folded.survived <= 1.0
    expected = rounding.survived(weight, update, merged, dtype)
    if norm:
        arrived = merged - rounding.rounded(weight, dtype)
        lost = oracle.frobenius(arrived - update)
        off = inaccuracy + 2 * bounds.U32 * (oracle.frobenius(arrived) + norm)
        tolerance = (2 * lost * off + off**2) / norm**2 + 2 * inaccuracy * lost**2 / norm**3
        assert folded.survived == pytest.approx(expected, rel=0, abs=tolerance + 1e-14)
    else:
        assert folded.survived == expected == 1.0
    return folded


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("stored", samples.DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_low_rank_delta(rows, stored, output):
    base = samples.normal(rows, 6, seed=rows, dtype=stored)
    assert_is_fold(base, samples.low_rank(rows, 6, 3, seed=1, scale=0.02), output)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("stored", samples.DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_dense_delta(rows, stored, output):
    base = samples.normal(rows, 6, seed=rows, dtype=stored)
    assert_is_fold(base, Dense(samples.normal(rows, 6, seed=1) * 0.02), output)


@pytest.mark.parametrize(
    ("stored", "output"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16), (torch.float64,) * 2],
)
@pytest.mark.parametrize("rows", [HEIGHT - 1, HEIGHT, HEIGHT + 1, 2 * HEIGHT + 3])
def test_more_rows_than_a_panel_has(rows, stored, output):
    base = samples.normal(rows, WIDTH, seed=rows, dtype=stored)
    factored = samples.low_rank(rows, WIDTH, 3, seed=1, scale=0.02)
    assert_is_fold(base, factored, output)
    assert_is_fold(base, Dense(factored.to_dense()), output)


def test_a_row_longer_than_a_panel():
    base = samples.normal(3, FOLD_ENTRIES + 5, seed=1, dtype=torch.bfloat16)
    assert_is_fold(base, samples.low_rank(3, FOLD_ENTRIES + 5, 2, scale=0.02), torch.bfloat16)


@samples.SEARCH
@given(st.data(), samples.lengths, samples.lengths, samples.dtypes, samples.dtypes, samples.seeds)
def test_every_shape_scale_and_dtype(data, m, n, stored, output, seed):
    delta = data.draw(samples.any_deltas(m, n))
    base = samples.normal(m, n, seed=seed, dtype=stored)
    if np.max(np.abs(samples.exact(delta))) < 1e4 or output != torch.float16:
        assert_is_fold(base, delta, output)


def eighths(*shape, seed, dtype):
    """Multiples of 1/8 up to 32: exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-255, 256, shape, generator=generator) / 8).to(dtype)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("stored", samples.DTYPES)
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_a_sum_exact_in_float32_is_rounded_to_the_nearest_even(kind, stored, output):
    base = eighths(600, 7, seed=1, dtype=stored)
    delta = samples.low_rank(600, 7, 3, dtype=stored, scale=2.0**-6, entries=samples.integers)
    if kind == "dense":
        delta = Dense(delta.to_dense().to(stored))
    weight, update = oracle.exact(base), samples.exact(delta)
    expected = rounding.rounded(weight + update, output)
    folded = fold(base, delta, output)
    np.testing.assert_array_equal(oracle.exact(folded.weight), expected)
    assert folded.update_norm == pytest.approx(oracle.frobenius(update), rel=1e-14)
    survived = rounding.survived(weight, update, expected, output)
    assert folded.survived == pytest.approx(survived, rel=1e-14)
    if output == torch.float32:
        assert folded.survived == 1.0
    elif output == torch.bfloat16:
        assert 0.1 < folded.survived < 0.9


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_row_gets_its_own_update(output):
    rows = 5 * HEIGHT + 2
    index = torch.arange(rows, dtype=torch.float32)[:, None]
    delta = LowRank(index, torch.ones(1, WIDTH))
    folded = fold(torch.zeros(rows, WIDTH), delta, output)
    assert torch.equal(folded.weight, index.to(output).expand(rows, WIDTH))
    dense = fold(torch.zeros(rows, WIDTH), Dense(delta.to_dense()), output)
    assert torch.equal(dense.weight, folded.weight)


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_the_number_of_threads_changes_nothing(kind, threads):
    base = samples.normal(500, 1100, seed=1, dtype=torch.bfloat16)
    delta = samples.low_rank(500, 1100, 40, scale=0.02)
    if kind == "dense":
        delta = Dense(delta.to_dense())
    threads(1)
    alone = fold(base, delta, torch.bfloat16)
    threads(3)
    shared = fold(base, delta, torch.bfloat16)
    assert torch.equal(alone.weight, shared.weight)
    assert (alone.update_norm, alone.survived) == (shared.update_norm, shared.survived)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-15, 1e15, 1e18, 1e25])
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_the_norm_of_a_tiny_and_of_a_huge_update(kind, scale):
    delta = samples.low_rank(300, 40, 3, scale=scale)
    if kind == "dense":
        delta = Dense(delta.to_dense())
    folded = assert_is_fold(torch.zeros(300, 40), delta, torch.float32)
    assert folded.survived == 1.0
    assert_is_fold(torch.zeros(300, 40), delta, torch.bfloat16)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("stored", samples.DTYPES)
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_a_zero_delta_changes_nothing_and_survives(kind, stored, output):
    base = samples.normal(300, 4, seed=1, dtype=stored)
    delta = LowRank(torch.zeros(300, 2), torch.ones(2, 4))
    if kind == "dense":
        delta = Dense(torch.zeros(300, 4))
    folded = fold(base, delta, output)
    np.testing.assert_array_equal(
        oracle.exact(folded.weight), rounding.rounded(oracle.exact(base), output)
    )
    assert folded.survived == 1.0
    assert folded.update_norm == 0.0


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_an_update_far_below_the_bfloat16_step_is_lost(kind):
    base = 1 + samples.normal(600, 8, seed=1).abs().to(torch.bfloat16)
    delta = samples.low_rank(600, 8, 2, scale=1e-6)
    if kind == "dense":
        delta = Dense(delta.to_dense())
    folded = assert_is_fold(base, delta, torch.bfloat16)
    assert torch.equal(folded.weight, base)
    assert folded.survived == 0.0
    assert folded.update_norm > 0.0
    assert assert_is_fold(base, delta, torch.float32).survived > 0.99


def test_an_update_far_above_the_step_survives():
    base = samples.normal(600, 8, seed=1, dtype=torch.bfloat16)
    assert assert_is_fold(base, samples.low_rank(600, 8, 2), torch.bfloat16).survived > 0.9999


def test_rounding_the_base_is_no_loss_of_the_update():
    base = samples.normal(300, 8, seed=1)
    delta = Dense(torch.where(samples.normal(300, 8, seed=2) > 0, 64.0, -64.0))
    coarse = assert_is_fold(base, delta, torch.bfloat16)
    assert coarse.survived > 0.999


def test_survival_is_counted_in_energy():
    base = torch.tensor([[0.5, 1.0]], dtype=torch.bfloat16).repeat(512, 1)
    arrives, is_lost = 2.0**-8, 2.0**-9
    delta = Dense(torch.tensor([[arrives, is_lost]]).repeat(512, 1))
    folded = assert_is_fold(base, delta, torch.bfloat16)
    assert folded.survived == pytest.approx(4 / 5, rel=1e-14)


@pytest.mark.parametrize("shape", [(), (5,), (300,), (6, 3, 2, 2), (300, 2, 2), (0, 5), (3, 0)])
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_shape_of_the_base_is_kept(shape, output):
    base = samples.normal(*shape, seed=1, dtype=torch.bfloat16)
    assert_is_fold(base, samples.dense(*shape, seed=2), output)


def test_a_low_rank_delta_of_a_kernel():
    base = samples.normal(6, 3, 2, 2, seed=1)
    assert_is_fold(base, samples.low_rank(6, 12, 2), torch.float32)


def test_a_base_that_is_not_contiguous():
    base = samples.normal(6, 300, seed=1).T
    assert not base.is_contiguous()
    assert_is_fold(base, samples.low_rank(300, 6, 2), torch.float32)


def test_the_inputs_are_left_alone():
    base, delta = samples.normal(300, 4, seed=1), samples.dense(300, 4, seed=2)
    before, update = base.clone(), delta.tensor.clone()
    folded = fold(base, delta, torch.float32)
    assert torch.equal(base, before)
    assert torch.equal(delta.tensor, update)
    assert folded.weight.data_ptr() != base.data_ptr()


def test_factored_and_multiplied_out_agree():
    base = samples.normal(600, 5, seed=1, dtype=torch.bfloat16)
    factored = samples.low_rank(600, 5, 3, scale=0.1)
    error = 2 * update_error(factored)
    first = fold(base, factored, torch.float32)
    second = fold(base, Dense(factored.to_dense()), torch.float32)
    difference = np.abs(oracle.exact(first.weight) - oracle.exact(second.weight))
    assert np.all(difference <= error + 2 * bounds.U32 * np.abs(oracle.exact(first.weight)))
    assert first.update_norm == pytest.approx(second.update_norm, rel=1e-6)


def test_overflow_of_the_output_is_an_infinity():
    base = torch.full((300, 2), 60000.0, dtype=torch.float16)
    update = torch.zeros(300, 2)
    update[280, 1] = 6000.0
    folded = fold(base, Dense(update), torch.float16)
    assert folded.weight[280, 1] == float("inf")
    assert torch.isfinite(folded.weight).sum() == 599
    assert 0.0 <= folded.survived <= 1.0


def test_badly_balanced_factors():
    B, A = samples.normal(300, 2, seed=1) * 1e10, samples.normal(2, 5, seed=2) * 1e-10
    assert_is_fold(samples.normal(300, 5, seed=3), LowRank(B, A, 0.1), torch.bfloat16)


def test_a_float64_base_keeps_its_digits():
    base = samples.normal(300, 4, seed=1, dtype=torch.float64)
    zero = fold(base, Dense(torch.zeros(300, 4)), torch.float64)
    assert torch.equal(zero.weight, base)
    assert_is_fold(base, samples.low_rank(300, 4, 2, scale=0.01), torch.float64)


def test_factors_are_those_that_add_something_however_they_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(7, 3, generator=generator), torch.randn(3, 5, generator=generator)
    padded_B, padded_A = torch.zeros(7, 6), torch.randn(6, 5, generator=generator)
    padded_B[:, [0, 2, 3]], padded_A[[0, 2, 3]] = B, A
    plain = factors_of(LowRank(B, A, 0.5))
    padded = factors_of(LowRank(padded_B.T.contiguous().T, padded_A.T.contiguous().T, 0.5))
    for one, other in zip(plain, padded, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous() and other.is_contiguous()
