"""The leading singular triplets of a low-rank delta of many factors, and what they leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.device import ready
from starmerge_models.spectral.factored import svd_factored
from starmerge_models.spectral.gram import svd_dense, svd_dense_bytes
from starmerge_models.spectral.svd import SVD, certainly

_MANY = 16
"""Directions for each one that is looked for, from which on iterating is the cheapest way."""

_MORE = 8
_SETTLED = 1e-5
_ROUNDING = 1e-12
_STEPS = 12
_PANEL = 2**22
_PIECE = 2**18
_SMALL = 2**21
"""Multiplications of a product that is made in float64: a matrix of few entries may be sums of many
products that cancel, of which float32 leaves too little."""

_EPS = torch.finfo(torch.float32).eps


def leading(delta: LowRank, k: int) -> tuple[SVD, float]:
    """Return the first k singular triplets of a low-rank delta, the best approximation of rank k.

    Of r factors of a matrix (m, n), the cheapest of three ways:

    - Where r < 16(k + 8) and r ≤ min(m, n), from the core of the factors, O((m + n)r² + r³).
    - Where 16(k + 8) is above min(m, n), from the product, O(mnr + mn·min(m, n)): there are more
      factors than the matrix has rows or columns, and the product takes less memory than they do.
    - Else by block Krylov iteration (Musco and Musco, arXiv 1504.05477, algorithm 2): a random
      block of k + 8 columns is multiplied by δᵀδ again and again, all blocks are made orthonormal,
      and the triplets are those of δ on their span (Rayleigh and Ritz). It ends when a step lowers
      the energy that they leave by less than 1e-5 of it, or after 12 steps. A step is made in the
      factors, O((m + n)rk), or, where it takes no more memory than they do, with their product,
      O(mnk), which is made once, O(mnr). The block is the same for the same shape.

    The core is made in float64; so is the product of the second way where r < 16(k + 8), or where
    it is small. Else products are made in float32, of factors scaled by a power of two so that no
    square leaves float32's range. Triplets below float32's precision, 1.2e-7 of σ_1, are left out,
    as the core leaves out what rounding may have made. Where factors nearly cancel, rounding is a
    share of the parts, not of what is left of them: about 1e-7 of the parts' norm where products
    are made in float32, below which neither triplets nor the energy mean anything.

    Args:
        delta: The delta, r factors.
        k: How many triplets.

    Returns:
        At most k triplets, float64, and the energy that they leave, ‖δ − U diag(S) Vᵀ‖². The
        latter is summed up from the difference itself, or from the other singular values; as a
        difference of two energies it would be rounding where little is left.

    Raises:
        ValueError: A factor or the scale has a NaN or an infinity.
    """
    m, n = delta.shape
    k = min(k, m, n, delta.rank)
    wanted = _MANY * (k + _MORE)
    few = delta.rank < wanted
    if few and delta.rank <= min(m, n):
        factored = svd_factored(delta)
        return factored.first(k), float(factored.S[k:].square().sum())
    exponent = _exponent(delta)
    if few or wanted > min(m, n):
        is_small = m * n * delta.rank <= _SMALL
        dtype = torch.float64 if few or is_small else torch.float32
        decomposed = svd_dense(Dense(_product(delta, exponent, dtype)))
        first = certainly(decomposed, lambda sure: sure.first(k))
        # The longer side's vectors are in the product's precision: they are images of the others.
        U, V = first.U.double(), first.V.double()
        found = _ritz(U * first.S, V) if n < m else _turned(_ritz(V * first.S, U))
        found, rank = _clean(found), _rank(decomposed.S)
        lost = float(decomposed.S[len(found.S) : rank].square().sum())
    else:
        found, lost = _iterated(delta, exponent, k)
    size = 2.0**exponent * abs(delta.scale)
    return SVD(found.U * math.copysign(1, delta.scale), found.S * size, found.V), lost * size**2


def leading_bytes(m: int, n: int, r: int, k: int) -> int:
    """Return the bytes at the peak of :func:`leading`, beside its argument, at most.

    Args:
        m: Rows of the delta.
        n: Its columns.
        r: Its factors, at most, in float32. Fewer of them may need more: they have a core.
        k: How many triplets.
    """
    p, k = min(m, n), min(k, m, n, r)
    width = k + _MORE
    wanted, panel = _MANY * width, 4 * max(_PANEL, n, r)
    few = min(r, wanted, p)
    # A factor in float64 while its Gram matrix is made; then the matrices that the core is made of.
    needs = [8 * max(m, n) * few + 64 * few**2]
    if wanted > p and r > p:
        # The product, and the factors in float64 that it is made of.
        product = 8 * m * n + max(8 * n * min(r, wanted) + 4 * panel, svd_dense_bytes(m, n, 8, k))
        needs.append(product)
    if wanted <= p and r >= wanted:
        # The product; the spans of both sides and their Gram matrix; blocks in several stages, in
        # which also the rest is looked at.
        columns = _STEPS * width
        spans = 8 * (m + n) * columns + 5 * 8 * columns**2 + 8 * 8 * (m + n) * width
        needs.append((4 * m * n if m * n <= (m + n) * r else 0) + max(4 * panel, spans))
    return max(needs) + 24 * (m + n) * k


def _exponent(delta: LowRank) -> int:
    """Return the binary exponent of the largest entry of any B_j A_j."""
    sizes = [torch.maximum(rows.amax(1), -rows.amin(1)) for rows in (delta.B.T, delta.A)]
    largest = float((sizes[0].double() * sizes[1].double()).max())
    if not (math.isfinite(largest) and math.isfinite(delta.scale)):
        raise ValueError("A factor or the scale of the delta has a NaN or an infinity.")
    return math.frexp(largest)[1]


def _reduced(tensor: Tensor, exponent: int) -> Tensor:
    """Return tensor / 2^exponent, in two steps, as the power may lie outside of float32's range."""
    half = exponent // 2
    return tensor * 2.0**-half * 2.0 ** (half - exponent)


def _panels(delta: LowRank, exponent: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield B / 2^exponent by panels of rows."""
    m, n = delta.shape
    height = max(1, _PANEL // max(n, delta.rank))
    for start in range(0, m, height):
        rows = slice(start, start + height)
        yield rows, _reduced(delta.B[rows].to(dtype), exponent)


def _product(delta: LowRank, exponent: int, dtype: torch.dtype) -> Tensor:
    """Return B A / 2^exponent."""
    product = torch.empty(delta.shape, dtype=dtype, device=delta.device)
    A = delta.A.to(dtype)
    for rows, panel in _panels(delta, exponent, dtype):
        torch.mm(panel, A, out=product[rows])
    return product


def _iterated(delta: LowRank, exponent: int, k: int) -> tuple[SVD, float]:
    """Return the first k triplets of B A / 2^exponent by iterating, and the energy they leave."""
    m, n = delta.shape
    product: Tensor | None = None
    if m * n <= (m + n) * delta.rank:
        product = _product(delta, exponent, torch.float32)
        there, back = product.__matmul__, product.T.__matmul__
    else:
        B, A = delta.B.float(), delta.A.float()
        there, back = (
            lambda X: B @ _reduced(A @ X, exponent),
            lambda Y: A.T @ _reduced(B.T @ Y, exponent),
        )
    # The span is searched on the shorter side, where there is less to make orthonormal.
    if n <= m:
        found = _krylov(there, back, (m, n), k, delta.device)
    else:
        found = _turned(_krylov(back, there, (n, m), k, delta.device))
    found = _clean(found)
    left, right = (found.U * found.S).float(), found.V.T.float()
    if product is not None:
        return found, _energy(product.addmm_(left, right, alpha=-1))
    panels = _panels(delta, exponent, torch.float32)
    return found, sum(_energy((B @ A).addmm_(left[rows], right, alpha=-1)) for rows, B in panels)


def _krylov(
    there: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    k: int,
    device: torch.device,
) -> SVD:
    """Return the first k triplets of an operator, float64; see :func:`leading`.

    Args:
        there: Multiplies float32 columns (n, w) by it.
        back: Multiplies float32 columns (m, w) by its transpose.
        shape: (m, n).
        k: How many.
        device: Where it works.
    """
    (m, n), width = shape, k + _MORE
    columns = _STEPS * width
    # Columns that lie one after the other, so that the first of them are one piece of memory.
    basis = torch.empty(columns, n, dtype=torch.float64, device=device).T
    images = torch.empty(columns, m, dtype=torch.float64, device=device).T
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=device)
    image = torch.randn(m, width, generator=torch.Generator().manual_seed(0)).to(device)
    end, energy = 0, 0.0
    for step in range(1, _STEPS + 1):
        fresh = _against(basis[:, :end], back(image).double())
        if not fresh.shape[1]:
            break
        image = there(fresh.float())
        start, end = end, end + fresh.shape[1]
        basis[:, start:end], images[:, start:end] = fresh, image
        gram[:end, start:end] = images[:, :end].T @ images[:, start:end]
        if step < _STEPS:
            values = torch.linalg.eigvalsh(ready(gram[:end, :end]), UPLO="U")
            before, energy = energy, float(values[-k:].sum())
            # What the span has besides is a part, so a lower bound, of what the triplets leave.
            left = float(values[:-k].sum())
            if energy - before <= _SETTLED * left + _ROUNDING * energy:
                break
    if not end:  # the operator is zero
        return SVD(images[:, :0], gram.new_zeros(0), basis[:, :0])
    _, vectors = torch.linalg.eigh(ready(gram[:end, :end]), UPLO="U")
    first = vectors[:, -k:]
    # Once more on their span alone: in float64 squares of σ below 1e-8 of σ_1 are rounding.
    return _ritz(images[:, :end] @ first, basis[:, :end] @ first)


def _against(basis: Tensor, block: Tensor) -> Tensor:
    """Return an orthonormal basis of what a block adds to the span of a basis, float64."""
    for _ in range(2):
        size = torch.linalg.vector_norm(block, dim=0).max()
        block = block - basis @ (basis.T @ block)
        block, triangle = torch.linalg.qr(ready(block))
        scale = triangle.diagonal().abs()
        block = block[:, scale > 1e-10 * scale.max()]
        # Where little is left of a column, rounding is a larger part of it: take that away too.
        if not block.shape[1] or bool((scale > 1e-5 * size).all()):
            break
    return block


def _ritz(images: Tensor, basis: Tensor) -> SVD:
    """Return the SVD of an operator on the span of an orthonormal basis, from the basis' images."""
    Q, R = torch.linalg.qr(ready(images))
    P, S, Wh = torch.linalg.svd(R)
    return SVD(Q @ P, S, basis @ Wh.T)


def _turned(found: SVD) -> SVD:
    """Return the triplets of the transpose."""
    return SVD(found.V, found.S, found.U)


def _energy(matrix: Tensor) -> float:
    """Return the sum of the squares, in float64, without a copy of the whole matrix in it."""
    pieces = torch.split(matrix, max(1, _PIECE // matrix.shape[1]))
    return sum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in pieces)


def _rank(S: Tensor) -> int:
    """Return how many singular values are above float32's precision."""
    return int((_EPS * S[:1].sum() < S).sum())


def _clean(found: SVD) -> SVD:
    """Return the triplets that are above float32's precision."""
    return found.first(_rank(found.S))
