"""Roots of semidefinite matrices: what they multiply to, and their rank."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.spectral.cholesky import pivoted_root

_U = 2.0**-53


@given(
    n=st.integers(1, 12),
    rank=st.integers(1, 12),
    scales=st.lists(st.integers(-6, 6), min_size=12, max_size=12),
    seed=st.integers(0, 2**31),
)
def test_the_root_multiplies_to_the_matrix(n: int, rank: int, scales: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    columns = 10.0 ** np.array(scales[:n])
    factor = generator.standard_normal((min(rank, n), n)) * columns
    matrix = factor.T @ factor
    root = pivoted_root(torch.from_numpy(matrix.copy())).numpy()
    assert root.shape[0] <= min(rank, n)
    # Higham (2002), theorem 10.14, and what is left when the pivots end.
    bound = 20 * n * _U * np.diag(matrix).max()
    assert np.abs(root.T @ root - matrix).max() <= bound


def test_the_rank_is_found_and_only_the_upper_triangle_read() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, rank in ((1, 1), (5, 3), (64, 10), (200, 200), (300, 40)):
        factor = torch.randn(rank, n, generator=generator, dtype=torch.float64)
        matrix = factor.T @ factor
        below = torch.full((n, n), torch.nan, dtype=torch.float64).tril(-1)
        root = pivoted_root(matrix.triu() + below)
        assert root.shape == (rank, n)
        assert torch.allclose(root.T @ root, matrix, rtol=0, atol=1e-12 * float(matrix.max()))


def test_pivots_come_first_and_zero_has_one_row() -> None:
    root = pivoted_root(torch.diag(torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64)))
    assert root.tolist() == [[0, 3, 0], [0, 0, 2], [1, 0, 0]]
    assert pivoted_root(torch.zeros(3, 3, dtype=torch.float64)).tolist() == [[0, 0, 0]]
