"""Eigenvalues and leading eigenvectors of a symmetric matrix."""

from __future__ import annotations

import ctypes
import math
from typing import Protocol

import torch
from torch import Tensor

from starmerge_models.spectral import lapack
from starmerge_models.spectral.svd import UncertainError

BLOCK = 64
"""Number of columns of LAPACK's work space; LAPACK's own blocks are not larger."""

TRIANGLE = 65 * 64
"""Additional work space of dormtr, for the triangular factor of a block."""


class Eigen(Protocol):
    """The eigendecomposition of a symmetric matrix (p, p), float64."""

    values: Tensor
    """(p,) descending."""

    def vectors(self, k: int) -> Tensor:
        """Return the eigenvectors (p, k) of the k largest eigenvalues."""


class Tridiagonal:
    """G = Q T Qᵀ with T tridiagonal: all eigenvalues now, eigenvectors on request.

    The steps are Householder's reduction (dsytrd), the eigenvalues of T without vectors (dsterf),
    eigenvectors of T by relatively robust representations (dlarre, dlarrv), and their product with
    Q (dormtr). dstemr computes eigenvectors in one call, but recomputes some eigenvalues by
    bisection, which takes longer than computing all of them by dlarre.

    Cost: 4/3 p³ for the eigenvalues, half of it limited by memory bandwidth, 2p²k for k vectors.
    The object holds G's 8p² bytes, in which Q is stored.

    Args:
        gram: (p, p) contiguous float64 on the CPU, p ≥ 2, overwritten. Only its upper triangle is
            read.

    Raises:
        ValueError: The matrix has fewer than two rows, for which dlarrv writes out of bounds.
        UncertainError: LAPACK failed.
    """

    def __init__(self, gram: Tensor) -> None:
        p = len(gram)
        if p < 2:
            raise ValueError(f"A matrix of {p} rows is not for LAPACK. Use FullEigen.")
        self._reflectors, self._tau = gram, gram.new_empty(p - 1)
        self._diagonal, self._off_diagonal = gram.new_empty(p), gram.new_zeros(p)
        work, info = gram.new_empty(BLOCK * p), ctypes.c_int()
        # The upper triangle in row-major order is the lower one in Fortran's column-major order.
        with lapack.one_thread():
            lapack.call(
                "dsytrd", "L", p, gram, p, self._diagonal, self._off_diagonal, self._tau,
                work, len(work), info,
            )  # fmt: skip
            _check("dsytrd", info)
            values, off_diagonal = self._diagonal.clone(), self._off_diagonal.clone()
            lapack.call("dsterf", p, values, off_diagonal, info)
            _check("dsterf", info)
        self.values = values.flip(0)

    def vectors(self, k: int) -> Tensor:
        """Return the eigenvectors (p, k) of the k largest eigenvalues.

        Raises:
            UncertainError: LAPACK failed.
        """
        p = len(self._diagonal)
        with lapack.one_thread():
            vectors = _leading(self._diagonal, self._off_diagonal, k)
            work, info = vectors.new_empty(BLOCK * k + TRIANGLE), ctypes.c_int()
            lapack.call(
                "dormtr", "L", "L", "N", p, k, self._reflectors, p, self._tau, vectors, p,
                work, len(work), info,
            )  # fmt: skip
        _check("dormtr", info)
        basis: Tensor = vectors.T
        return basis


class FullEigen:
    """The eigendecomposition by torch, with all vectors, for devices without LAPACK.

    Args:
        gram: (p, p) float64. Only its upper triangle is read.
        home: Device of the stored values and vectors; by default that of the matrix.
    """

    def __init__(self, gram: Tensor, home: torch.device | None = None) -> None:
        values, vectors = torch.linalg.eigh(gram, UPLO="U")
        self._vectors = vectors.to(home or gram.device)
        self.values = values.flip(0).to(home or gram.device)

    def vectors(self, k: int) -> Tensor:
        """Return the eigenvectors (p, k) of the k largest eigenvalues."""
        leading: Tensor = self._vectors[:, len(self.values) - k :].flip(1)
        return leading


def _leading(diagonal: Tensor, off_diagonal: Tensor, k: int) -> Tensor:
    """Return the eigenvectors of a tridiagonal matrix's k largest eigenvalues, as rows (k, p)."""
    p, eps = len(diagonal), torch.finfo(torch.float64).eps / 2
    # Negate T, so that the largest eigenvalues come first and their vectors fill the first columns
    # of Z.
    d, e = -diagonal, -off_diagonal
    squares = e.square()
    tolerances = math.sqrt(eps), max(5e-3 * math.sqrt(eps), 4 * eps)
    values, errors, gaps = d.new_zeros(p), d.new_zeros(p), d.new_zeros(p)
    discs, work = d.new_zeros(2 * p), d.new_zeros(12 * p)
    ends, blocks, places = (torch.zeros(p, dtype=torch.int32) for _ in range(3))
    support, integers = (torch.zeros(n * p, dtype=torch.int32) for n in (2, 7))
    low, high, pivot = ctypes.c_double(), ctypes.c_double(), ctypes.c_double()
    count, found, info = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    lapack.call(
        "dlarre", "A", p, low, high, 1, p, d, e, squares, *tolerances, -eps, count, ends, found,
        values, errors, gaps, blocks, places, discs, pivot, work, integers, info,
    )  # fmt: skip
    _check("dlarre", info)
    if found.value != p:
        raise UncertainError(f"dlarre found {found.value} eigenvalues of {p}.")
    # If T splits into blocks, the values ascend within each block only and lack the block's shift.
    order = (values + e[ends[blocks.long() - 1].long() - 1]).argsort()[:k]
    last = int(order.max()) + 1 if k else 0
    vectors = d.new_empty(min(last + 1, p), p)  # dlarrv also writes to the next column
    lapack.call(
        "dlarrv", p, low, high, d, e, pivot, ends, found, 1, last, 1e-3, *tolerances,
        values, errors, gaps, blocks, places, discs, vectors, p, support, work, integers, info,
    )  # fmt: skip
    _check("dlarrv", info)
    return vectors[:k] if count.value == 1 else vectors[order]


def _check(routine: str, info: ctypes.c_int) -> None:
    if info.value:
        raise UncertainError(f"{routine} failed (info {info.value}).")
