"""The leading triplets of many factors, against NumPy's SVD of the product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starmerge.deltas import LowRank
from starmerge.spectral.leading import MANY, energy_of, leading


def _delta(m: int, n: int, r: int, decay: float, seed: int) -> tuple[LowRank, np.ndarray]:
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    B *= np.arange(1, r + 1) ** -decay
    B, A = B.astype(np.float32), A.astype(np.float32)
    delta = LowRank(torch.from_numpy(B), torch.from_numpy(A), 0.5)
    return delta, 0.5 * B.astype(np.float64) @ A.astype(np.float64)


@settings(max_examples=25)
@given(
    m=st.integers(2, 90),
    n=st.integers(2, 90),
    r=st.integers(1, 400),
    k=st.integers(1, 12),
    decay=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_keeps_the_energy_of_the_best_approximation(
    m: int, n: int, r: int, k: int, decay: float, seed: int
) -> None:
    delta, product = _delta(m, n, r, decay, seed)
    found = leading(delta, k)
    S = np.linalg.svd(product, compute_uv=False)
    k = min(k, m, n, r)
    approximation = ((found.U * found.S) @ found.V.T).numpy()
    lost = float(np.square(product - approximation).sum())
    energy = float(np.square(S).sum())
    assert len(found.S) <= k
    assert lost <= float(np.square(S[k:]).sum()) + 3e-5 * energy
    assert energy_of(delta) == pytest.approx(energy, rel=1e-5)
    for basis in (found.U, found.V):
        gram = (basis.T @ basis).numpy()
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-6)


def test_iterates_where_the_factors_are_many() -> None:
    delta, product = _delta(300, 200, MANY * 20, 0.3, 7)
    found = leading(delta, 4)
    S = np.linalg.svd(product, compute_uv=False)
    np.testing.assert_allclose(found.S.numpy(), S[:4], rtol=1e-3)
    again = leading(delta, 4)
    assert torch.equal(found.U, again.U)


def test_zero_has_no_direction() -> None:
    zero = LowRank(torch.zeros(30, 400), torch.randn(400, 20))
    assert float(leading(zero, 3).S.sum()) == 0
    assert energy_of(zero) == 0
