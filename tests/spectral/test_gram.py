"""The fast decomposition of dense deltas: as numpy's, certified, and exact where it is not sure."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, Stored
from starmerge_models.spectral import (
    SVD,
    GramSVD,
    UncertainError,
    svd_dense,
    tridiagonal,
    truncate_and_rescale,
)
from starmerge_models.spectral.gram import SMALL, _full_float32
from starmerge_models.spectral.noise import Rounding, noise_floor
from starmerge_models.spectral.tridiagonal import FullEigen, Tridiagonal
from tests.oracles import bounds, samples, spectra, star
from tests.oracles import deltas as oracle

SHAPES = [(SMALL, SMALL), (130, 301), (301, 130)]
SEARCH = settings(samples.SEARCH, max_examples=40)


def dense(family, m, n, *, seed=0, dtype=torch.float32):
    """A delta of a family of spectra."""
    return Dense(torch.from_numpy(spectra.FAMILIES[family](m, n, seed)).to(dtype))


@pytest.fixture
def exact_reasons(caplog):
    """Why exact SVDs were made."""
    caplog.set_level(logging.DEBUG, logger="starmerge_models.spectral")
    return lambda: [record.getMessage() for record in caplog.records]


# ------------------------------------------------------------------------------- What is computed


@pytest.mark.parametrize("eigen", [Tridiagonal, FullEigen])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", spectra.FAMILIES)
def test_singular_values_are_within_their_error(family, shape, eigen):
    delta = dense(family, *shape)
    found = GramSVD(delta, eigen=eigen)
    sigma = oracle.singular_values(samples.exact(delta))
    error = np.abs(found.S.numpy() - sigma)
    assert np.all(error <= found.error.numpy() + bounds.spectrum(delta))
    assert np.all(np.diff(found.S.numpy()) <= 0)


def assert_is_truncation(delta, eta, eigen=None):
    """The rank is float64's and the truncated delta is so to 1e-5, where the cut is no cluster."""
    decomposed = GramSVD(delta, eigen=eigen) if eigen else svd_dense(delta)
    kept, report = truncate_and_rescale(decomposed, eta=eta)
    matrix = samples.exact(delta)
    sigma = oracle.singular_values(matrix)
    assert report.rank in star.admissible_ranks(sigma, eta, slack=1e-11)
    # NUCLEAR of what may be unknown, and what the norm differs by because D is float32
    assert report.nuclear_before == pytest.approx(np.sum(sigma), rel=1e-5)
    expected = star.truncated(matrix, report.rank)
    difference = oracle.frobenius(samples.values(kept) - expected)
    # At a cluster any of its directions may be kept.
    assert bounds.gap(sigma, report.rank) <= 1e-5 or difference <= 1e-5 * oracle.frobenius(expected)


@pytest.mark.parametrize("eta", [5, 40, 80, 99])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", spectra.FAMILIES)
def test_truncations_are_those_of_float64(family, shape, eta):
    assert_is_truncation(dense(family, *shape, seed=3), eta)


@SEARCH
@given(
    st.integers(SMALL, SMALL + 30),
    st.integers(SMALL, SMALL + 60),
    st.floats(0.0, 3.0),
    st.floats(0.0, 5.0),
    st.floats(1.0, 99.9),
    samples.seeds,
)
def test_every_power_law_and_dominance(m, n, exponent, dominance, eta, seed):
    sigma = np.arange(1, min(m, n) + 1) ** -exponent
    sigma[0] *= 10**dominance
    matrix = spectra.with_spectrum(sigma, m, n, seed=seed)
    assert_is_truncation(Dense(torch.from_numpy(matrix).float()), eta)


@pytest.mark.parametrize("dtype", [*samples.DTYPES, torch.float64])
def test_every_dtype(dtype):
    for eigen in (Tridiagonal, FullEigen):
        assert_is_truncation(dense("power law", 140, 200, dtype=dtype), 60, eigen)


def test_float64_deltas_are_multiplied_in_float64():
    delta = dense("power law", 140, 200, dtype=torch.float64)
    found = GramSVD(delta).first(50)
    assert found.U.dtype == found.V.dtype == torch.float64
    U, sigma, Vt = np.linalg.svd(samples.exact(delta))
    expected = (U[:, :50] * sigma[:50]) @ Vt[:50]
    # Vectors of a Gram matrix known to 16√p u: 2 u 16√p σ_1²/(σ_50² − σ_51²), by Wedin.
    gap = sigma[49] ** 2 - sigma[50] ** 2
    tolerance = 32 * np.sqrt(140) * bounds.U64 * sigma[0] ** 2 / gap * np.linalg.norm(sigma[:50])
    difference = oracle.frobenius(((found.U * found.S) @ found.V.T).numpy() - expected)
    assert difference <= tolerance < 1e-9


def test_the_short_sides_vectors_are_float64_and_the_others_as_the_delta():
    wide, tall = (GramSVD(dense("flat", *shape)).first(9) for shape in ((130, 301), (301, 130)))
    assert (wide.U.dtype, wide.V.dtype) == (torch.float64, torch.float32)
    assert (tall.U.dtype, tall.V.dtype) == (torch.float32, torch.float64)
    assert (wide.U.shape, wide.V.shape) == ((130, 9), (301, 9))
    assert (tall.U.shape, tall.V.shape) == ((301, 9), (130, 9))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_memory_layout(shape):
    plain = dense("low rank and noise", *shape)
    matrix = plain.tensor
    by_columns = matrix.T.contiguous().T
    strided = torch.stack([matrix, matrix + 1], dim=2)[:, :, 0]
    expected = truncate_and_rescale(GramSVD(plain), eta=40)[0].to_dense()
    for other in (by_columns, strided):
        assert not other.is_contiguous()
        found = truncate_and_rescale(GramSVD(Dense(other)), eta=40)[0].to_dense()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_kernels_and_stored_fine_tunes():
    matrix = dense("power law", 130, 144).tensor
    kernel = Dense(matrix.reshape(130, 16, 3, 3))
    base = samples.normal(130, 144, seed=1, dtype=torch.bfloat16)
    tuned = Stored([(1.0, (base.float() + matrix).bfloat16())], base)
    for delta in (kernel, tuned):
        assert_is_truncation(delta, 40)


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(torch.float32, [-100, -30, 30, 100]), (torch.float64, [-900, -300, 300, 900])],
)
def test_powers_of_two_scale_the_result_and_nothing_else(dtype, exponents):
    delta = dense("low rank and noise", 140, 160, dtype=dtype)
    plain = GramSVD(delta)
    first = plain.first(20)
    for exponent in exponents:
        scaled = GramSVD(Dense(delta.tensor * 2.0**exponent))
        assert torch.equal(scaled.S, plain.S * 2.0**exponent)
        assert torch.equal(scaled.error, plain.error * 2.0**exponent)
        found = scaled.first(20)
        assert torch.equal(found.U, first.U)
        assert torch.equal(found.V, first.V)


def test_the_inputs_are_left_alone():
    for dtype in (torch.float32, torch.float64):
        delta = dense("flat", 130, 150, dtype=dtype)
        before = delta.tensor.clone()
        GramSVD(delta).first(20)
        assert torch.equal(delta.tensor, before)


def test_it_is_the_same_again_and_for_any_number_of_threads():
    delta = dense("flat", 150, 600)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            decomposed = GramSVD(delta)
            decomposed.first(40)
            found = decomposed.first(30)
            outputs.append((decomposed.S, found.U, found.V))
    finally:
        torch.set_num_threads(before)
    for other in outputs[1:]:
        assert all(map(torch.equal, outputs[0], other))


def test_more_triplets_than_there_are():
    found = GramSVD(dense("flat", 130, 160)).first(1000)
    assert len(found.S) == 130
    assert GramSVD(dense("flat", 130, 160)).first(0).U.shape == (130, 0)


# ---------------------------------------------------------------------------- When it is not sure


def test_large_deltas_are_fast_and_small_ones_exact():
    assert isinstance(svd_dense(dense("flat", SMALL, SMALL)), GramSVD)
    assert isinstance(svd_dense(dense("flat", SMALL - 1, 500)), SVD)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value):
    delta = dense("flat", 130, 140)
    delta.tensor[7, 8] = value
    with pytest.raises(UncertainError, match="largest entry"):
        GramSVD(delta)
    with pytest.raises(torch.linalg.LinAlgError):
        svd_dense(delta)


def test_a_zero_matrix_has_no_triplets():
    found = svd_dense(Dense(torch.zeros(150, 140)))
    assert (found.S.shape, found.first(3).U.shape) == ((0,), (150, 0))


def swapped(vectors):
    """A direction that was dropped in place of one that is kept."""
    vectors[:, [3, -1]] = vectors[:, [-1, 3]]
    return vectors[:, :-1]


def noisy(vectors):
    """Each entry off by 1e-4 of a vector's length."""
    noise = samples.normal(*vectors.shape, seed=5, dtype=torch.float64)
    return (vectors + 1e-4 * noise)[:, :-1]


def doubled(vectors):
    """One vector twice."""
    vectors[:, 4] = vectors[:, 3]
    return vectors[:, :-1]


def unfinished(vectors):
    """A NaN."""
    vectors[2, 2] = float("nan")
    return vectors[:, :-1]


def faulty(fault):
    """An eigensolver whose vectors have a fault; it sees one vector more than it is asked for."""

    class Faulty(Tridiagonal):
        def vectors(self, k):
            return fault(super().vectors(k + 1))

    return Faulty


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (swapped, "singular vectors"),
        (noisy, "orthonormality"),
        (doubled, "orthonormality"),
        (unfinished, "off by nan"),
    ],
)
@pytest.mark.parametrize("family", ["flat", "power law", "low rank and noise"])
def test_faulty_vectors_are_caught(family, fault, message, exact_reasons):
    delta = dense(family, 140, 160)
    with pytest.raises(UncertainError, match=message):
        GramSVD(delta, eigen=faulty(fault)).first(20)
    kept, report = truncate_and_rescale(GramSVD(delta, eigen=faulty(fault)), eta=40)
    assert len(exact_reasons()) == 1
    expected = star.truncated(samples.exact(delta), report.rank)
    difference = oracle.frobenius(samples.values(kept) - expected)
    assert difference <= bounds.gamma(report.rank + 5, bounds.U32) * report.nuclear_before


def test_the_subspace_of_a_randomised_svd_is_caught():
    delta = dense("power law", 140, 160)

    class Randomised(Tridiagonal):
        def vectors(self, k):
            generator = torch.Generator().manual_seed(0)
            sketch = torch.randn(160, k + 10, generator=generator, dtype=torch.float64)
            D = delta.tensor.double()
            Q = torch.linalg.qr(D @ (D.T @ (D @ sketch)))[0]
            return Q @ torch.linalg.svd(Q.T @ D, full_matrices=False)[0][:, :k]

    with pytest.raises(UncertainError, match="singular vectors"):
        GramSVD(delta, eigen=Randomised).first(20)


def test_a_rotation_within_the_kept_subspace_is_caught():
    class Rotated(Tridiagonal):
        def vectors(self, k):
            return super().vectors(k) @ torch.from_numpy(samples.orthogonal(k, seed=1))

    with pytest.raises(UncertainError, match="singular vectors"):
        GramSVD(dense("power law", 140, 160), eigen=Rotated).first(20)


@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["flat", "power law", "low rank and noise", "dominated by 1e3"])
def test_a_vector_turned_towards_a_dropped_one_is_caught(family, dtype, angle):
    class Turned(Tridiagonal):
        def vectors(self, k):
            vectors = super().vectors(k + 50)
            last = vectors[:, -1].clone()
            vectors[:, 0] = np.cos(angle) * vectors[:, 0] + np.sin(angle) * last
            return vectors[:, :k]

    with pytest.raises(UncertainError, match="residuals|energy"):
        GramSVD(dense(family, 140, 160, dtype=dtype), eigen=Turned).first(20)


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("small", [1.0, 0.1])
def test_neighbours_exchanged_at_the_cut_are_caught(small, gap):
    class Exchanged(Tridiagonal):
        def vectors(self, k):
            vectors = super().vectors(k + 1)
            vectors[:, k - 1] = vectors[:, k]
            return vectors[:, :k]

    delta, _ = with_near_tie(100, gap, small)
    with pytest.raises(UncertainError, match="singular vectors|residuals"):
        GramSVD(delta, eigen=Exchanged).first(100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_less_precision_are_caught(dtype):
    delta = dense("flat", 140, 160, dtype=dtype)
    decomposed = GramSVD(delta)
    X = delta.matrix
    U = decomposed.first(20).U
    scaled = decomposed._scale * U.T
    W = scaled.to(dtype) @ X
    decomposed._check_on_signs(X, U, W)
    less = {torch.float32: torch.bfloat16, torch.float64: torch.float32}[dtype]
    W = (scaled.to(less) @ X.to(less)).to(dtype)
    with pytest.raises(UncertainError, match="products"):
        decomposed._check_on_signs(X, U, W)


@pytest.mark.parametrize("change", [1e-8, -1e-8])
def test_a_wrong_eigenvalue_is_caught(change):
    class Wrong(Tridiagonal):
        def __init__(self, gram):
            super().__init__(gram)
            self.values[2] *= 1 + change

    with pytest.raises(UncertainError, match="energy of the singular values"):
        GramSVD(dense("flat", 140, 160), eigen=Wrong)


def test_eigenvalues_that_trade_energy_are_caught():
    class Wrong(Tridiagonal):
        def __init__(self, gram):
            super().__init__(gram)
            moved = 0.01 * self.values[2]
            self.values[2] -= moved
            self.values[120] += moved

    with pytest.raises(UncertainError, match="singular vectors"):
        GramSVD(dense("power law", 140, 160), eigen=Wrong).first(20)


def test_a_failure_of_lapack_makes_the_svd_exact(monkeypatch, exact_reasons):
    def failing(name, *arguments):
        if name == "dsytrd":
            arguments[-1].value = 3

    monkeypatch.setattr(tridiagonal.lapack, "call", failing)
    delta = dense("flat", 140, 160)
    found = svd_dense(delta)
    assert isinstance(found, SVD)
    assert exact_reasons() == ["Exact SVD: dsytrd failed (info 3)."]
    sigma = oracle.singular_values(samples.exact(delta))
    np.testing.assert_allclose(found.S.numpy(), sigma, rtol=0, atol=bounds.spectrum(delta))


def test_the_exact_svd_is_made_once():
    decomposed = GramSVD(dense("flat", 140, 160))
    assert decomposed.exact() is decomposed.exact()


# ---------------------------------------------------------------- What hangs on the last few digits


@pytest.mark.parametrize(
    ("factor", "rank"), [(0.9999, 100), (1 / (1 - 1e-12), None), (1.0001, 101)]
)
def test_a_share_at_the_edge_of_the_rule_is_left_to_the_exact_svd(factor, rank, exact_reasons):
    sigma = np.linspace(2, 1, 200)
    delta = Dense(torch.from_numpy(spectra.with_spectrum(sigma, 200, 200)))
    eta = 100 * np.sum(sigma[:100]) / np.sum(sigma) * factor
    _, report = truncate_and_rescale(svd_dense(delta), eta=eta)
    assert report.rank in ((rank,) if rank else (100, 101))
    assert len(exact_reasons()) == (0 if rank else 1)


def with_near_tie(rank, gap, small, *, dtype=torch.float64):
    """σ from 1 to ½, but σ_1 = 2/small and σ_{r+1} = (1 − gap) σ_r; and its first r triplets."""
    sigma = small * np.linspace(1, 0.5, 192)
    sigma[0], sigma[rank] = 2, sigma[rank - 1] * (1 - gap)
    matrix = spectra.with_spectrum(sigma, 192, 256)
    first = spectra.with_spectrum(sigma[:rank], 192, 256)
    return Dense(torch.from_numpy(matrix).to(dtype)), first


@pytest.mark.parametrize("small", [1.0, 1e-3])
@pytest.mark.parametrize(("gap", "sure"), [(1e-3, True), (1e-6, True), (1e-11, False), (0, False)])
def test_a_near_tie_at_the_cut_is_left_to_the_exact_svd(gap, sure, small, exact_reasons):
    delta, first = with_near_tie(100, gap, small)
    kept, report = truncate_and_rescale(svd_dense(delta), eta=40, rank=100)
    assert (not exact_reasons()) == sure
    assert all("at the cut" in reason for reason in exact_reasons())
    difference = oracle.frobenius(samples.values(kept) / report.factor - first)
    # In a tie any of its directions may be kept.
    assert gap == 0 or difference <= 1e-5 * oracle.frobenius(first)


ORDINARY = [name for name in spectra.FAMILIES if name not in ("clustered", "deficient", "steps")]


@pytest.mark.parametrize("eta", [1, 20, 40, 60, 90, 99])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ORDINARY)
def test_without_clusters_nothing_is_left_to_the_exact_svd(family, shape, eta, exact_reasons):
    truncate_and_rescale(svd_dense(dense(family, *shape, seed=8)), eta=eta)
    assert not exact_reasons()


@pytest.mark.parametrize(("rank", "expected", "sure"), [(2, 2, True), (3, 3, True), (9, 3, False)])
def test_a_given_rank_above_the_true_one_is_left_to_the_exact_svd(
    rank, expected, sure, exact_reasons
):
    low = samples.low_rank(150, 140, 3, entries=samples.integers)
    _, report = truncate_and_rescale(svd_dense(Dense(low.to_dense())), eta=40, rank=rank)
    assert report.rank == expected
    assert (not exact_reasons()) == sure


def test_eta_100_of_a_deficient_matrix_keeps_its_rank(exact_reasons):
    delta = dense("deficient", 150, 140)
    _, report = truncate_and_rescale(svd_dense(delta), eta=100)
    assert report.rank == np.linalg.matrix_rank(samples.exact(delta))
    assert len(exact_reasons()) == 1


def test_a_nuclear_norm_that_rounding_hides_is_left_to_the_exact_svd(exact_reasons):
    matrix = spectra.dominated(320, 300, factor=1e7)
    delta = Dense(torch.from_numpy(matrix))
    _, report = truncate_and_rescale(svd_dense(delta), eta=40)
    assert exact_reasons() == ["Exact SVD: Rounding leaves too much of the nuclear norm open."]
    expected = np.sum(oracle.singular_values(matrix))
    assert report.nuclear_before == pytest.approx(expected, rel=1e-12)


def test_a_noise_floor_at_a_singular_value_is_left_to_the_exact_svd(exact_reasons):
    delta = dense("power law", 140, 160, dtype=torch.float64)
    decomposed = svd_dense(delta)
    uniform = Rounding(torch.full((140,), 160.0).double(), torch.full((160,), 140.0).double())
    level = float(decomposed.S[19]) / noise_floor(decomposed.S, uniform).value
    for factor, sure in ((1.0, False), (1.01, True)):
        variance = (factor * level) ** 2
        rounding = Rounding(variance * uniform.rows, variance * uniform.columns)
        _, report = truncate_and_rescale(decomposed, eta=99, rounding=rounding)
        assert report.noise.above in ((19,) if sure else (19, 20))
        assert len(exact_reasons()) == 1  # of the first turn


def test_without_noise_there_is_no_floor_to_be_close_to(exact_reasons):
    delta = dense("deficient", 140, 160)
    silent = Rounding(torch.zeros(140).double(), torch.zeros(160).double())
    _, report = truncate_and_rescale(svd_dense(delta), eta=40, rounding=silent)
    assert not report.noise.applies
    assert not exact_reasons()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_below_a_floor_is_left_out(shape, exact_reasons):
    delta = dense("power law", *shape, dtype=torch.float64)
    sigma = oracle.singular_values(samples.exact(delta))
    found = svd_dense(delta, float(sigma[29] + sigma[30]) / 2)
    assert isinstance(found, GramSVD)
    assert len(found.S) == len(found.error) == len(found.first(50).S) == len(found.exact().S) == 30
    assert not exact_reasons()
    at_the_edge = svd_dense(delta, float(sigma[29]))
    assert isinstance(at_the_edge, SVD)
    assert len(exact_reasons()) == 1


# ----------------------------------------------------------------------------------- Other devices


def test_tensorfloat_32_is_off_on_an_accelerator_and_comes_back():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with _full_float32(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        with _full_float32(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
