"""What is measured of one tensor, against float64 NumPy written from the definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank, Stored
from starmerge_models.methods import make_pipeline
from starmerge_models.methods.method import TensorContext
from starmerge_models.study.inspection import entries as entries_room
from starmerge_models.study.inspection.conflict import conflict_of
from starmerge_models.study.inspection.entries import entries_of
from starmerge_models.study.inspection.kept import Kept, kept_of
from starmerge_models.study.inspection.module_names import module_names
from starmerge_models.study.inspection.spectrum import Spectrum, spectrum_of
from tests.oracles import inspection as oracle
from tests.oracles import samples, spectra

M, N = 23, 31


def context(shape=(M, N), base=None, *, is_embedding=False):
    return TensorContext("w", shape, is_embedding, ("a", "b"), (1.0, 1.0), base)


def spectra_of(deltas, eta=60.0):
    found = [spectrum_of(delta, context(delta.shape), eta) for delta in deltas]
    assert all(isinstance(own, Spectrum) for own in found)
    return found


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("eta", [20.0, 60.0, 100.0])
def test_spectrum(kind, eta):
    for delta in samples.task_deltas(kind, M, N):
        tau = samples.exact(delta)
        sigma = np.linalg.svd(tau, compute_uv=False)
        (own,) = spectra_of([delta], eta)
        np.testing.assert_allclose(own.values, sigma[: len(own.values)], rtol=1e-9, atol=1e-10)
        assert own.rank == np.linalg.matrix_rank(tau)
        assert own.kept == oracle.kept_rank(tau, eta)
        assert own.truncation.nuclear_before == pytest.approx(sigma.sum())
        assert own.effective_rank == pytest.approx(oracle.effective_rank(sigma), rel=1e-6)
        assert own.stable_rank == pytest.approx(oracle.stable_rank(tau))
        assert own.top_share == pytest.approx(sigma[0] / sigma.sum())
        assert own.top_energy == pytest.approx(sigma[0] ** 2 / (sigma**2).sum())
        assert own.energy == pytest.approx((sigma**2).sum())
        assert own.noise == 0


def test_spectrum_of_nothing_and_of_what_is_averaged():
    (own,) = spectra_of([LowRank(torch.zeros(M, 3), torch.ones(3, N))])
    assert (own.rank, own.kept, own.effective_rank, own.stable_rank) == (0, 0, 0, 0)
    assert (own.top_share, own.top_energy, own.participation, own.noise) == (0, 0, 0, 0)
    table = Dense(torch.ones(M, N))
    assert spectrum_of(table, context(is_embedding=True), 40) is None
    assert spectrum_of(Dense(torch.ones(M)), context((M,)), 40) is None


def test_a_stored_fine_tune_is_seen_above_its_noise_floor():
    torch.manual_seed(0)
    m, n = 160, 192
    base = torch.randn(m, n).to(torch.bfloat16)
    update = torch.tensor(spectra.with_spectrum(np.array([0.5, 0.3, 0.2]), m, n))
    stored = Stored([(1.0, (base.double() + update).to(torch.bfloat16))], base)
    tensor = context((m, n), base)
    own = spectrum_of(stored, tensor, 40)
    assert own is not None
    _, truncation = make_pipeline("star").transforms[0].apply(stored, 0, tensor, None)
    assert own.truncation == truncation
    assert own.truncation.noise.applies
    assert own.rank == own.truncation.noise.above == 3
    assert own.kept == 1
    energy = float(stored.tensor.double().square().sum())
    assert own.noise == pytest.approx(1 - own.above / energy)
    assert 0.1 < own.noise < 0.5


@pytest.mark.parametrize("kind", samples.KINDS)
def test_conflict(kind):
    deltas = samples.task_deltas(kind, M, N)
    taus, eta = [samples.exact(delta) for delta in deltas], 60.0
    found = conflict_of(deltas, spectra_of(deltas, eta))
    kept = [oracle.kept_rank(tau, eta) for tau in taus]
    whole = [np.linalg.matrix_rank(tau) for tau in taus]
    for i, j in itertools.product(range(len(taus)), repeat=2):
        a, b = taus[i], taus[j]
        expected = {
            "inner": np.sum(a * b),
            "response": oracle.response(a, b),
            "along": oracle.along(a, b),
            "overlap_in": oracle.overlap(oracle.input_moment(a), oracle.input_moment(b)),
            "overlap_out": oracle.overlap(oracle.output_moment(a), oracle.output_moment(b)),
            "chance_in": oracle.chance(oracle.input_moment(a), oracle.input_moment(b)),
            "chance_out": oracle.chance(oracle.output_moment(a), oracle.output_moment(b)),
            "acting": oracle.acting(a, b, kept[j]),
            "bound": oracle.bound(a, b, kept[i], kept[j]),
            "reach": oracle.reach(a, b, kept[i], kept[j]),
            "rms": oracle.rms(a, b, kept[i], kept[j]),
            "bound_whole": oracle.bound(a, b, whole[i], whole[j]),
            "reach_whole": oracle.reach(a, b, whole[i], whole[j]),
        }
        size = np.linalg.norm(a) * np.linalg.norm(b)
        for name, value in expected.items():
            got = getattr(found, name)[i, j]
            assert got == pytest.approx(value, rel=1e-6, abs=1e-7 * size), (name, i, j)


def test_conflict_leaves_open_what_has_no_directions():
    deltas = [
        samples.low_rank(M, N, 3),
        LowRank(torch.zeros(M, 2), torch.ones(2, N)),
        samples.low_rank(M, N, 2, seed=5),
    ]
    found = conflict_of(deltas, spectra_of(deltas))
    assert np.isnan(found.overlap_in[1]).all()
    assert np.isnan(found.reach[:, 1]).all()
    assert found.inner[1].tolist() == [0, 0, 0]
    assert found.overlap_in[0, 2] < 1 == pytest.approx(found.overlap_in[0, 0])
    vectors = [Dense(torch.tensor([3.0, 4.0])), Dense(torch.tensor([4.0, -3.0]))]
    found = conflict_of(vectors, [None, None])
    np.testing.assert_allclose(found.inner, [[25, 0], [0, 25]])
    assert np.isnan(found.response).all()


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    eta=st.sampled_from([10.0, 40.0, 90.0, 100.0]),
    seed=st.integers(0, 10_000),
)
def test_the_bound_holds_and_shares_are_shares(m, n, ranks, eta, seed):
    deltas = [samples.low_rank(m, n, r, seed=seed + k) for k, r in enumerate(ranks)]
    found = conflict_of(deltas, spectra_of(deltas, eta))
    slack = 1 + 1e-9
    assert (found.rms <= found.reach * slack).all()
    assert (found.reach <= found.bound * slack).all()
    assert (found.reach_whole <= found.bound_whole * slack).all()
    assert ((found.overlap_in >= 0) & (found.overlap_in <= 1)).all()
    energies = np.diag(found.inner)
    assert (found.acting <= energies[:, None] * slack).all()
    # Cauchy and Schwarz, on the inputs of j.
    limit = np.sqrt(found.response * np.diag(found.response))
    assert (np.abs(found.along) <= limit * slack + 1e-12 * limit.max()).all()


def test_the_bound_is_reached_by_one_direction():
    deltas = [samples.low_rank(M, N, 1, seed=1), samples.low_rank(M, N, 1, seed=2)]
    found = conflict_of(deltas, spectra_of(deltas))
    np.testing.assert_allclose(found.reach, found.bound)
    np.testing.assert_allclose(found.rms, found.bound)


def test_random_directions_overlap_as_much_as_by_chance():
    m, n, count = 40, 300, 40
    deltas = [samples.low_rank(m, n, 4, seed=seed) for seed in range(count)]
    found = conflict_of(deltas, spectra_of(deltas))
    apart = ~np.eye(count, dtype=bool)
    for side in ("in", "out"):
        overlap, chance = getattr(found, f"overlap_{side}"), getattr(found, f"chance_{side}")
        assert overlap[apart].mean() == pytest.approx(chance[apart].mean(), rel=0.05)


def test_a_scale_changes_answers_and_no_overlap():
    a, b = samples.low_rank(M, N, 3, seed=1), samples.low_rank(M, N, 5, seed=2)
    once = conflict_of([a, b], spectra_of([a, b]))
    large = a.scaled(4.0)
    found = conflict_of([large, b], spectra_of([large, b]))
    np.testing.assert_allclose(found.overlap_in, once.overlap_in, rtol=1e-12)
    assert found.response[0, 1] == pytest.approx(16 * once.response[0, 1])
    assert found.response[1, 0] == pytest.approx(once.response[1, 0])
    assert found.along[0, 1] == pytest.approx(4 * once.along[0, 1])


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_entries(kind, dtype):
    deltas = samples.task_deltas(kind, M, N)
    taus = [delta.entries().double().numpy() for delta in deltas]
    base = samples.normal(M, N, seed=99, dtype=dtype)
    found = entries_of(deltas, base)
    assert found.step == 1
    for i, j in itertools.product(range(len(taus)), repeat=2):
        ratio = (1 - found.products[i, j] / found.magnitudes[i, j]) / 2
        assert ratio == pytest.approx(oracle.sign_conflict(taus[i], taus[j]), abs=1e-6)
    for t, tau in enumerate(taus):
        share = found.outvoted[t] / found.sizes[t]
        assert share == pytest.approx(oracle.outvoted(tau, taus), abs=1e-6)
        survived = 1 - found.lost[t] / found.updates[t]
        assert survived == pytest.approx(oracle.survived(base, tau, dtype), abs=1e-5)
    assert found.base == pytest.approx(float(base.double().square().sum()))


def test_entries_of_a_large_tensor_are_those_of_some_rows(monkeypatch):
    monkeypatch.setattr(entries_room, "MAX_ENTRIES", 200)
    monkeypatch.setattr(entries_room, "_PANEL", 100)
    base = samples.normal(M, N, seed=99, dtype=torch.bfloat16)
    finetuned = (base + samples.normal(M, N, seed=7)).to(torch.bfloat16)
    deltas = [samples.low_rank(M, N, 3), Stored([(1.0, finetuned)], base)]
    found = entries_of(deltas, base)
    assert found.step == 5  # odd
    rows = [delta.entries().double().numpy()[::5] for delta in deltas]
    scale = M / len(rows[0])
    np.testing.assert_allclose(
        found.products, [[scale * np.sum(a * b) for b in rows] for a in rows], rtol=1e-5, atol=1e-4
    )
    np.testing.assert_allclose(found.sizes, [scale * np.abs(a).sum() for a in rows], rtol=1e-5)
    assert found.base == pytest.approx(scale * float(base[::5].double().square().sum()))
    # What a fine-tune stores survives the rounding to its own dtype.
    assert found.lost[1] == pytest.approx(0, abs=1e-9 * found.updates[1])


def test_an_update_below_half_an_ulp_does_not_survive():
    base = torch.full((M, N), 1.0, dtype=torch.bfloat16)
    small = Dense(torch.full((M, N), 2.0**-10))
    large = Dense(torch.full((M, N), 0.5))
    found = entries_of([small, large], base)
    assert found.lost[0] == pytest.approx(found.updates[0])
    assert found.lost[1] == 0


@pytest.mark.parametrize("merge", ["low-rank", "dense"])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_kept(kind, merge):
    deltas = samples.task_deltas(kind, M, N)
    merged = (
        samples.low_rank(M, N, 5, seed=77) if merge == "low-rank" else samples.dense(M, N, seed=77)
    )
    exact = samples.exact(merged)
    for delta, own in zip(deltas, spectra_of(deltas), strict=True):
        tau = samples.exact(delta)
        record = kept_of(merged, delta, own).record()
        expected = oracle.kept(exact, tau)
        got = (record["own"], record["others"], record["error"])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        coefficient = np.sum(exact * tau) / np.linalg.norm(tau) ** 2
        assert record["coefficient"] == pytest.approx(coefficient, rel=1e-5, abs=1e-6)
        inside = oracle.inside(exact, tau, own.kept)
        assert record["inside"] == pytest.approx(inside, rel=1e-4, abs=1e-7)


def test_a_task_alone_is_kept_whole_and_half_of_it_by_half():
    delta = samples.low_rank(M, N, 4)
    (own,) = spectra_of([delta], 100)
    whole = kept_of(delta, delta, own).record()
    for key in ("own", "coefficient", "inside"):
        assert whole[key] == pytest.approx(1)
    assert whole["error"] == pytest.approx(0, abs=1e-6)
    half = kept_of(delta.scaled(0.5), delta, own).record()
    assert half["own"] == pytest.approx(0.5)
    assert half["error"] == pytest.approx(0.5)
    assert half["others"] == pytest.approx(0, abs=1e-6)
    assert Kept().record() == dict.fromkeys(
        ("coefficient", "own", "others", "error", "inside"), None
    )


def test_kept_adds_up_to_that_of_the_tensors_side_by_side():
    """Over block-diagonal matrices the sums are those of the whole, but for each block's C."""
    pairs = [
        (samples.low_rank(M, N, 3, seed=k), samples.low_rank(M, N, 2, seed=k + 9)) for k in (1, 2)
    ]
    found = sum(
        (kept_of(M_, tau, spectra_of([tau])[0]) for M_, tau in pairs), start=Kept()
    ).record()
    inner = sum(np.sum(samples.exact(a) * samples.exact(b)) for a, b in pairs)
    energy = sum(np.linalg.norm(samples.exact(b)) ** 2 for _, b in pairs)
    assert found["coefficient"] == pytest.approx(inner / energy)
    own = sum(oracle.along(samples.exact(a), samples.exact(b)) for a, b in pairs)
    response = sum(oracle.response(samples.exact(b), samples.exact(b)) for _, b in pairs)
    assert found["own"] == pytest.approx(own / response)
    total = sum(oracle.response(samples.exact(a), samples.exact(b)) for a, b in pairs)
    assert found["others"] == pytest.approx(math.sqrt(total / response - (own / response) ** 2))


def test_modules_have_short_names_that_tell_them_apart():
    llama = [
        f"model.layers.{k}.{part}.weight"
        for k in (0, 1)
        for part in ("self_attn.q_proj", "mlp.up_proj")
    ]
    found = module_names(
        [*llama, "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.a.bias"]
    )
    assert found["model.layers.1.self_attn.q_proj.weight"] == "q_proj"
    assert found["model.layers.0.mlp.up_proj.weight"] == "up_proj"
    assert found["model.embed_tokens.weight"] == "embed_tokens"
    assert found["lm_head.weight"] == "lm_head"
    assert found["model.layers.0.a.bias"] == "bias"
    t5 = [
        f"{side}.block.0.layer.{k}.{part}.weight"
        for side, k, part in (
            ("encoder", 0, "SelfAttention.q"),
            ("decoder", 0, "SelfAttention.q"),
            ("decoder", 1, "EncDecAttention.q"),
        )
    ]
    assert list(module_names(t5).values()) == [
        "encoder: q",
        "decoder: SelfAttention.q",
        "decoder: EncDecAttention.q",
    ]
