"""The leading triplets of many factors and what they leave, against NumPy's SVD of the product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starmerge_models.deltas import LowRank
from starmerge_models.errors import StarmergeError
from starmerge_models.spectral.leading import leading, leading_bytes
from starmerge_models.spectral.svd import SVD

SPECTRA = ("flat", "decaying", "steep", "dominated", "low rank")


@dataclass(frozen=True)
class Case:
    """A size for which one of the ways is the cheapest."""

    m: int
    n: int
    r: int
    k: int


CASES = {
    "core": Case(90, 70, 40, 5),
    "float64 product": Case(60, 90, 100, 8),
    "float32 product": Case(150, 90, 400, 8),
    "iterating, wide product": Case(150, 260, 300, 1),
    "iterating, high product": Case(260, 180, 320, 3),
    "iterating in wide factors": Case(340, 420, 160, 2),
    "iterating in high factors": Case(420, 330, 160, 2),
}


def _delta(case: Case, spectrum: str, seed: int = 0, scale: float = 0.5) -> LowRank:
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((case.m, case.r)), rng.standard_normal((case.r, case.n))
    if spectrum == "decaying":
        B *= np.arange(1, case.r + 1) ** -0.5
    if spectrum == "steep":
        B *= 0.8 ** np.arange(case.r)
    if spectrum == "dominated":
        B[:, 0] *= 1e4
    if spectrum == "low rank":
        B = B[:, :6] @ rng.standard_normal((min(6, case.r), case.r))
    return LowRank(torch.from_numpy(B).float(), torch.from_numpy(A).float(), scale)


def _product(delta: LowRank) -> np.ndarray:
    return delta.scale * (delta.B.double().numpy() @ delta.A.double().numpy())


def _check(delta: LowRank, k: int, found: SVD, lost: float) -> None:
    """Check the triplets, and that what they leave is told and hardly more than what must be."""
    product = _product(delta)
    S = np.linalg.svd(product, compute_uv=False)
    k = min(k, *delta.shape, delta.rank)
    energy, tail = float(np.square(S).sum()), float(np.square(S[k:]).sum())
    left = product - ((found.U * found.S) @ found.V.T).numpy()
    true = float(np.square(left).sum())
    assert len(found.S) <= k
    assert (found.S[:-1] >= found.S[1:]).all()
    # Sums of many products in float32 are known to 1e-6 of their norm.
    assert true <= (1 + 1e-4) * tail + 1e-12 * energy
    assert lost == pytest.approx(true, rel=1e-4, abs=1e-12 * energy)
    assert float(found.S.square().sum()) + lost == pytest.approx(energy, rel=1e-6)
    for basis in (found.U, found.V):
        gram = (basis.T @ basis).numpy()
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-6)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", CASES)
def test_is_the_best_approximation_and_tells_what_it_leaves(name: str, spectrum: str) -> None:
    delta = _delta(CASES[name], spectrum)
    _check(delta, CASES[name].k, *leading(delta, CASES[name].k))


@settings(max_examples=40)
@given(
    m=st.integers(1, 200),
    n=st.integers(1, 200),
    r=st.integers(1, 400),
    k=st.integers(1, 12),
    spectrum=st.sampled_from(SPECTRA),
    seed=st.integers(0, 99),
)
def test_any_size(m: int, n: int, r: int, k: int, spectrum: str, seed: int) -> None:
    delta = _delta(Case(m, n, r, k), spectrum, seed)
    _check(delta, k, *leading(delta, k))


@pytest.mark.parametrize("name", CASES)
def test_a_power_of_two_changes_nothing_else(name: str) -> None:
    """Neither where squares of entries leave float32's range, nor where the entries do."""
    case = CASES[name]
    plain = _delta(case, "flat")
    wanted, lost = leading(plain, case.k)
    powers = [(70, 40, 1.0), (-90, -10, 1.0), (100, -100, 1.0), (-80, -75, 1.0)]
    for b, a, scale in [*powers, (0, 0, -(2.0**200))]:
        delta = LowRank(plain.B * 2.0**b, plain.A * 2.0**a, plain.scale * scale)
        found, rest = leading(delta, case.k)
        unit = 2.0 ** (a + b) * scale
        np.testing.assert_allclose(found.S.numpy(), wanted.S.numpy() * abs(unit), rtol=1e-6)
        assert rest == pytest.approx(lost * unit**2, rel=1e-5)
        update, expected = ((x.U * x.S) @ x.V.T for x in (found, wanted))
        distance = torch.linalg.vector_norm(update - expected * unit)
        assert distance <= 1e-4 * torch.linalg.vector_norm(update)


def test_factors_of_very_different_scales() -> None:
    """The first factors have all of their size in B, the others in A."""
    for name in ("iterating, high product", "iterating in wide factors", "float32 product"):
        delta, k = _delta(CASES[name], "flat"), CASES[name].k
        sizes = torch.full((delta.rank,), 2.0**80)
        sizes[: delta.rank // 2] = 2.0**-80
        uneven = LowRank(delta.B * sizes, delta.A / sizes[:, None], delta.scale)
        _check(uneven, k, *leading(uneven, k))


@pytest.mark.parametrize("name", CASES)
def test_the_same_factors_give_the_same_bytes(name: str) -> None:
    delta = _delta(CASES[name], "flat")
    first, again = (leading(delta, CASES[name].k) for _ in range(2))
    assert torch.equal(first[0].U, again[0].U) and first[1] == again[1]


@pytest.mark.parametrize("name", CASES)
def test_zero_has_no_direction(name: str) -> None:
    delta, k = _delta(CASES[name], "flat"), CASES[name].k
    zero = LowRank(torch.zeros_like(delta.B), delta.A)
    found, lost = leading(zero, k)
    assert len(found.S) == lost == 0
    assert (len(found.U), len(found.V)) == delta.shape


@pytest.mark.parametrize("name", CASES)
def test_factors_that_cancel_leave_rounding_alone(name: str) -> None:
    delta, k = _delta(CASES[name], "flat"), CASES[name].k
    half = delta.rank // 2
    B = torch.cat([delta.B[:, :half], -delta.B[:, :half]], 1)
    A = torch.cat([delta.A[:half], delta.A[:half]])
    found, lost = leading(LowRank(B, A), k)
    size = float(torch.linalg.vector_norm(delta.to_dense()))
    assert (float(found.S.square().sum()) + lost) ** 0.5 <= 1e-5 * size


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", CASES)
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    delta = _delta(CASES[name], "flat")
    delta.A[1, 1] = value
    with pytest.raises(StarmergeError, match="NaN or an infinity"):
        leading(delta, CASES[name].k)


@given(
    m=st.integers(1, 3000),
    n=st.integers(1, 3000),
    r=st.integers(1, 9000),
    k=st.integers(1, 300),
    less=st.integers(0, 9000),
)
def test_fewer_factors_need_no_more_memory(m: int, n: int, r: int, k: int, less: int) -> None:
    """A merge knows only the most that there may be, as some methods keep a part of them."""
    assert leading_bytes(m, n, max(1, r - less), k) <= leading_bytes(m, n, r, k)


@pytest.mark.parametrize(("r", "spectrum", "seed"), [(311, "dominated", 1), (310, "flat", 2)])
def test_one_entry_that_is_a_sum_of_many_products(r: int, spectrum: str, seed: int) -> None:
    delta = _delta(Case(1, 1, r, 1), spectrum, seed)
    _check(delta, 1, *leading(delta, 1))
