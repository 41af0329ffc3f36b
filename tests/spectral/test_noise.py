"""The noise floor: its parts against definitions, and what it finds in LoRAs that were stored."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.models import open_model
from starmerge_models.checkpoints.source import resolve
from starmerge_models.spectral import kept_rank, noise
from starmerge_models.spectral.noise import (
    Rounding,
    noise_edge,
    noise_floor,
    rounding_noise,
)
from starmerge_models_demo import ADAPTERS
from tests.oracles import noise as oracle
from tests.oracles import star as star_oracle

HALVES = [torch.bfloat16, torch.float16]


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(m, n, sigma, *, seed):
    """A matrix with these singular values and random singular vectors."""
    U = torch.linalg.qr(normal(m, len(sigma), seed=seed))[0]
    V = torch.linalg.qr(normal(n, len(sigma), seed=seed + 1))[0]
    return (U * torch.as_tensor(sigma, dtype=torch.float64)) @ V.T


def stored(base, update, dtype):
    """The delta of a fine-tune that was stored in a dtype, as a checkpoint's reader makes it."""
    return (base.double() + update).to(dtype).double() - base.double()


def floor_of(base, delta, dtype):
    return noise_floor(torch.linalg.svdvals(delta), rounding_noise(base, delta, dtype))


def ulp_of(weights, dtype):
    """Root mean square of the ulps."""
    return float(np.sqrt(np.mean(oracle.ulp(weights, dtype) ** 2)))


# ---------------------------------------------------------------------------- Variance of an entry


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("size", [1e-9, 1.0])
def test_off_the_grid_the_noise_is_uniform_whatever_the_update(dtype, size):
    base = normal(7, 40, seed=1) * torch.logspace(-9, 2, 40, dtype=torch.float64)
    delta = stored(base, size * base * normal(7, 40, seed=2), dtype)
    found = rounding_noise(base, delta, dtype)
    variances = oracle.ulp(base + delta, dtype) ** 2 / 12
    np.testing.assert_allclose(found.rows, variances.sum(1), rtol=1e-12)
    np.testing.assert_allclose(found.columns, variances.sum(0), rtol=1e-12)


@pytest.mark.parametrize("dtype", HALVES)
def test_on_the_grid_a_wide_update_gets_uniform_noise(dtype):
    base = normal(30, 50, seed=3).to(dtype)
    # From 3 ulps of the largest on, all moments differ from the uniform ones by less than 1e-30.
    step = oracle.ulp(base, dtype).max()
    delta = stored(base, 3 * step * normal(30, 50, seed=4), dtype)
    found = rounding_noise(base, delta, dtype)
    variances = oracle.ulp(base.double() + delta, dtype) ** 2 / 12
    np.testing.assert_allclose(found.rows, variances.sum(1), rtol=1e-12)
    np.testing.assert_allclose(found.columns, variances.sum(0), rtol=1e-12)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6, 1.0])
def test_on_the_grid_a_small_update_gets_what_does_not_follow_it(share):
    base = normal(3, 80, seed=5).to(torch.bfloat16)
    update = share * ulp_of(base, torch.bfloat16) * normal(3, 80, seed=6)
    delta = stored(base, update, torch.bfloat16)
    found = rounding_noise(base, delta, torch.bfloat16)
    ulps = oracle.ulp(base.double() + delta, torch.bfloat16)
    variances = np.zeros_like(ulps)
    for i, row in enumerate(ulps):
        s = oracle.scale_of_row(row, float(delta[i].square().sum()))
        variances[i] = [u * u * oracle.residual(s / u) if s > 0.02 * u else 0.0 for u in row]
    # From s = ulp on, the closed forms are off by some exp(-2π²) = 3e-9 of ulp².
    np.testing.assert_allclose(found.rows, variances.sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.columns, variances.sum(0), rtol=1e-5)


@pytest.mark.parametrize("s", [0.2, 0.3, 0.5, 1.0])
def test_the_variance_is_that_of_the_part_that_does_not_follow_the_update(s):
    # All weights in one binade, so that the oracle's gain holds for all entries.
    base = (1.2 + 0.5 * uniform(256, 256, seed=7)).to(torch.bfloat16)
    step = 2.0**-7
    update = s * step * normal(256, 256, seed=8)
    delta = stored(base, update, torch.bfloat16)
    errors = (delta - oracle.rounded_normal(s)[1] * update).square()
    measured = float(errors.sum())
    predicted = float(rounding_noise(base, delta, torch.bfloat16).rows.sum())
    # Four standard deviations of what is measured, and of the energy that the prediction is from.
    slope = (oracle.residual(1.01 * s) - oracle.residual(0.99 * s)) / (
        oracle.rounded_normal(1.01 * s)[0] - oracle.rounded_normal(0.99 * s)[0]
    )
    spread = 4 * 256 * (float(errors.std()) + abs(slope) * float(delta.square().std()))
    assert abs(predicted - measured) < spread
    assert spread < 0.3 * measured


def test_float64_weights_of_every_size_have_their_ulps():
    sizes = torch.tensor([1e-290, 1e-3, 3.9, 4.0, 4.5, 1e3, 1e100], dtype=torch.float64)
    base = sizes[:, None] * (1 + 0.1 * uniform(7, 40, seed=12))
    delta = stored(base, 1e-3 * base * normal(7, 40, seed=13), torch.float64)
    found = rounding_noise(base, delta, torch.float64)
    variances = np.spacing((base + delta).numpy()) ** 2 / 12
    # Updates of 1e12 ulps: the noise is uniform.
    np.testing.assert_allclose(found.rows, variances.sum(1), rtol=1e-12)


def test_variances_beyond_float64_have_no_floor_below_infinity():
    rounding = rounding_noise(
        torch.full((5, 8), 1e300, dtype=torch.float64),
        1e290 * normal(5, 8, seed=14),
        torch.float64,
    )
    assert noise_edge(rounding.rows, rounding.columns) == math.inf
    assert not noise_floor(torch.full((5,), 1e299, dtype=torch.float64), rounding).applies


def test_an_update_whose_square_is_beyond_float64_spoils_no_sum():
    unit = 2.0**516
    base = torch.full((5, 8), 1.5 * unit, dtype=torch.float64)
    update = 0.3 * unit * normal(5, 8, seed=14).tanh()
    rounding = rounding_noise(base, update, torch.float64)
    expected = unit * 2.0**-52 / math.sqrt(12) * (math.sqrt(5) + math.sqrt(8))
    assert noise_edge(rounding.rows, rounding.columns) == pytest.approx(expected, rel=1e-9)


def test_a_delta_of_zero_on_the_grid_has_no_noise():
    base = normal(5, 8, seed=9).to(torch.bfloat16)
    found = rounding_noise(base, torch.zeros(5, 8), torch.bfloat16)
    assert float(found.rows.sum()) < 1e-30 * float(base.double().square().sum())
    assert floor_of(base, torch.zeros(5, 8), torch.bfloat16).above == 0


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_a_matrix_without_entries_has_no_floor(shape):
    found = rounding_noise(torch.zeros(shape), torch.zeros(shape), torch.bfloat16)
    assert (found.rows.shape, found.columns.shape) == (shape[:1], shape[1:])
    assert noise_floor(torch.zeros(0), found).applies is False


def test_panels_do_not_show(monkeypatch):
    monkeypatch.setattr(noise, "PANEL_ENTRIES", 12_000)
    base = normal(1009, 12, seed=10).to(torch.bfloat16)
    delta = stored(base, 1e-3 * normal(1009, 12, seed=11), torch.bfloat16)
    whole = rounding_noise(base, delta, torch.bfloat16)
    parts = [
        rounding_noise(base[rows], delta[rows], torch.bfloat16)
        for rows in (slice(900), slice(900, None))
    ]
    torch.testing.assert_close(
        whole.rows, torch.cat([part.rows for part in parts]), rtol=1e-6, atol=0
    )
    columns = parts[0].columns + parts[1].columns
    torch.testing.assert_close(whole.columns, columns, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------- Edge

sums = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30)


@settings(max_examples=20)
@given(st.integers(1, 500), st.integers(1, 500), st.floats(1e-12, 1e6))
def test_equal_variances_give_the_edge_of_marchenko_and_pastur(m, n, variance):
    edge = noise_edge(
        torch.full((m,), n * variance, dtype=torch.float64),
        torch.full((n,), m * variance, dtype=torch.float64),
    )
    # The derivative at the parameter that is found is below 1e-6, of which the square enters.
    assert edge == pytest.approx(math.sqrt(variance) * (math.sqrt(m) + math.sqrt(n)), rel=1e-9)


def profile(rows, columns):
    """Sums of one total, for v_ij = r_i c_j / Σr."""
    rows, columns = np.array(rows), np.array(columns)
    return torch.tensor(rows), torch.tensor(columns * (rows.sum() / columns.sum()))


@settings(max_examples=15)
@given(sums, sums)
def test_the_edge_is_that_of_the_free_operator(rows, columns):
    r, c = profile(rows, columns)
    expected = oracle.edge((r[:, None] * c / r.sum()).numpy())
    # The oracle's bisection ends at 1e-4; so close to its edge the iteration may run out of steps.
    assert noise_edge(r, c) == pytest.approx(expected, rel=1e-3)


@settings(max_examples=20)
@given(sums, sums, st.floats(1e-6, 1e6))
def test_the_edge_lies_below_the_bound_and_scales(rows, columns, factor):
    r, c = profile(rows, columns)
    edge = noise_edge(r, c)
    largest = math.sqrt(float(r.max())), math.sqrt(float(c.max()))
    assert max(largest) * (1 - 1e-9) <= edge <= sum(largest) * (1 + 1e-7)
    assert noise_edge(c, r) == pytest.approx(edge, rel=1e-7)
    assert noise_edge(r * factor**2, c * factor**2) == pytest.approx(edge * factor, rel=1e-9)


# ------------------------------------------------------------------------------------------ Floor


def weights(kind, m, n, *, seed):
    """Weights of equal or of very different rows and columns."""
    drawn = normal(m, n, seed=seed) * 0.05
    if kind in ("rows", "both"):
        drawn *= torch.exp(0.7 * normal(m, 1, seed=seed + 1))
    if kind in ("columns", "both"):
        drawn *= torch.exp(0.7 * normal(1, n, seed=seed + 2))
    return drawn


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["even", "rows", "columns", "both"])
@pytest.mark.parametrize("shape", [(256, 256), (96, 384), (384, 96)])
def test_nothing_of_pure_rounding_noise_stands_above_the_floor(kind, shape, dtype):
    for seed in range(0, 40, 10):
        base = weights(kind, *shape, seed=seed)
        delta = stored(base, torch.zeros(shape), dtype)
        floor = floor_of(base, delta, dtype)
        assert floor.above == 0
        assert not floor.applies
        # Nor is the floor far above. Where few rows or columns hold most of the noise, a finite
        # matrix falls short of the limit.
        reached = float(torch.linalg.matrix_norm(delta, 2)) / floor.value
        assert reached > (0.8 if kind == "even" else 0.5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["even", "rows"])
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("ulps", [0.5, 1.0, 16.0])
@pytest.mark.parametrize("on_grid", [True, False])
def test_the_rank_and_the_nuclear_norm_of_a_stored_lora_are_found(dtype, kind, rank, ulps, on_grid):
    m, n = 144, 240
    base = weights(kind, m, n, seed=20 + rank)
    base = base.to(dtype) if on_grid else base
    sigma = np.linspace(1.0, 0.5, rank)
    sigma *= ulps * ulp_of(base, dtype) * math.sqrt(m * n) / np.linalg.norm(sigma)
    update = low_rank(m, n, sigma, seed=30 + rank)
    delta = stored(base, update, dtype)
    S = torch.linalg.svdvals(delta)
    floor = floor_of(base, delta, dtype)
    error = float(torch.linalg.matrix_norm(delta - update, 2))  # Weyl: of each singular value
    # Whatever stands higher than the floor and the error together must be found, and no more. An
    # update of rank one makes an error that follows its rows and columns: that may stand out.
    extra = 1 if rank == 1 and on_grid else 0
    assert int(np.sum(sigma > floor.value + error)) <= floor.above <= rank + extra
    assert float(S[rank : floor.above].sum()) < 0.1 * sigma.sum()
    assert floor.applies
    if ulps >= 1.0:
        assert floor.above >= rank
        assert abs(float(S[:rank].sum()) - sigma.sum()) <= rank * error
        assert kept_rank(S[:rank], 40) in star_oracle.admissible_ranks(
            sigma, 40, slack=2 * rank * error / sigma.sum()
        )
        # And the noise that is left out had a good share of the norm: it does matter.
        assert float(S.sum()) > (1.4 if ulps == 1.0 else 1.01) * sigma.sum()


@pytest.mark.parametrize("dtype", HALVES)
def test_directions_too_weak_to_see_are_left_out_but_none_are_made_up(dtype):
    base = weights("even", 200, 300, seed=50).to(dtype)
    step = ulp_of(base, dtype)
    sigma = np.geomspace(300.0, 0.3, 16) * step
    delta = stored(base, low_rank(200, 300, sigma, seed=51), dtype)
    floor = floor_of(base, delta, dtype)
    assert floor.applies
    # By the spiked model σ is seen as √((σ² + mv)(σ² + nv))/σ; 10 % for the noise's own scatter.
    v = step**2 / 12
    seen = np.sqrt((sigma**2 + 200 * v) * (sigma**2 + 300 * v)) / sigma
    seen = np.where(sigma**2 > v * math.sqrt(200 * 300), seen, 0.0)
    assert np.sum(seen > 1.1 * floor.value) <= floor.above <= np.sum(seen > 0.9 * floor.value)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_an_update_of_full_rank_is_not_dropped_as_noise(share, decay):
    base = weights("even", 160, 240, seed=60).to(torch.bfloat16)
    update = low_rank(160, 240, np.arange(1, 161.0) ** -decay, seed=61)
    update *= share * ulp_of(base, torch.bfloat16) / update.square().mean().sqrt()
    delta = stored(base, update, torch.bfloat16)
    floor = floor_of(base, delta, torch.bfloat16)
    S = torch.linalg.svdvals(delta)
    kept = S[: floor.above] if floor.applies else S
    # At most half of the energy below the floor is more than noise, or all of it is kept.
    assert float(kept.square().sum()) > 0.9 * float(S.square().sum())


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-3, 10.0), st.integers(0, 99))
def test_no_trained_delta_on_the_grid_vanishes_and_none_lies_farther_than_zero(m, n, size, seed):
    base = normal(m, n, seed=seed).to(torch.bfloat16)
    update = size * ulp_of(base, torch.bfloat16) * normal(m, n, seed=seed + 100)
    delta = stored(base, update, torch.bfloat16)
    # torch rounds float64 to bfloat16 by way of float32, which may move a value past a tie.
    twice = 2.0**-23 * (base.double() + update).abs()
    assert torch.all((delta - update).abs() <= update.abs() + twice)
    floor = floor_of(base, delta, torch.bfloat16)
    assert not floor.applies or floor.above > 0
    assert math.isfinite(floor.value)
    assert math.isfinite(floor.share)


@pytest.mark.parametrize("factor", [2.0**-20, -4.0])
def test_a_scaled_delta_has_the_floor_scaled(factor):
    base = weights("rows", 60, 90, seed=70).to(torch.bfloat16)
    delta = stored(base, low_rank(60, 90, [2.0, 1.0], seed=71), torch.bfloat16)
    S, rounding = torch.linalg.svdvals(delta), rounding_noise(base, delta, torch.bfloat16)
    plain, scaled = (
        noise_floor(S, rounding),
        noise_floor(
            S * abs(factor), Rounding(rounding.rows * factor**2, rounding.columns * factor**2)
        ),
    )
    assert scaled.value == pytest.approx(plain.value * abs(factor), rel=1e-12)
    assert (scaled.above, scaled.applies) == (plain.above, plain.applies) == (2, True)


def test_a_fine_tune_stored_in_float32_keeps_every_direction_but_the_last_digits():
    base = weights("even", 100, 150, seed=80).float()
    sigma = np.geomspace(1.0, 1e-4, 20)
    delta = stored(base, low_rank(100, 150, sigma, seed=81), torch.float32)
    floor = floor_of(base, delta, torch.float32)
    assert (floor.above, floor.applies) == (20, True)
    assert floor.value < 1e-6


# --------------------------------------------------------------------------------- Real adapters


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("task", ["continent", "digits"])
def test_real_adapters_are_recovered_from_stored_fine_tunes(smollm2, task, dtype):
    base = open_base(resolve(smollm2))
    model = open_model(task, resolve(ADAPTERS / task), base)
    for name in sorted(model.tensors)[::23]:
        weight = base.checkpoint.read(name)
        update = model.delta(name, weight).to_dense().double()
        sigma = torch.linalg.svdvals(update)[:16]
        delta = stored(weight, update, dtype)
        S = torch.linalg.svdvals(delta)
        floor = floor_of(weight, delta, dtype)
        assert floor.applies
        kept = S[: floor.above]
        error = float(torch.linalg.matrix_norm(delta - update, 2))
        assert int((sigma > floor.value + error).sum()) <= floor.above <= 16
        found, true = float(kept.sum()), float(sigma.sum())
        assert abs(found - true) <= floor.above * error + float(sigma[floor.above :].sum())
        # Noise adds to the values kept, and hides those below it: 0.963 to 1.013 of the true norm,
        # measured on all 480 deltas of the demo (benchmarks/noise_floor.py).
        assert found == pytest.approx(true, rel=0.04)
        assert kept_rank(kept, 40) in star_oracle.admissible_ranks(sigma.numpy(), 40, slack=0.02)
        assert float(S.sum()) > 1.02 * true
