"""Square root of a positive semidefinite matrix, with as many rows as its numerical rank."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from starmerge_models.spectral import lapack


def pivoted_root(matrix: Tensor) -> Tensor:
    """Return R (k, n) with RᵀR = A, by the Cholesky decomposition with complete pivoting (dpstrf).

    The decomposition ends at the first pivot of at most n · 2⁻⁵³ of the largest, which is LAPACK's
    default: k is the numerical rank of A, but at least 1. The rows of R are in the order of the
    pivots, and R is triangular up to a permutation of the columns.

    Cost: at most n k² operations (multiply and add) in one thread; no memory besides A and R.

    Args:
        matrix: A (n, n), float64, contiguous, on the CPU, finite; overwritten. Only its upper
            triangle is read.

    Raises:
        ValueError: LAPACK refuses an argument.
    """
    n = len(matrix)
    pivots, work = torch.empty(n, dtype=torch.int32), matrix.new_empty(2 * n)
    rank, info = ctypes.c_int(), ctypes.c_int()
    # The upper triangle in row-major order is the lower one in Fortran's column-major order.
    with lapack.one_thread():
        lapack.call("dpstrf", "L", n, matrix, n, pivots, rank, -1.0, work, info)
    if info.value < 0:
        raise ValueError(f"dpstrf refuses its argument {-info.value}.")
    k = max(1, rank.value)
    root = matrix.new_empty(k, n)
    root[:, pivots.long() - 1] = matrix[:k].triu()
    return root
