"""The leading singular triplets of a low-rank delta of many factors, and the residual energy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.device import ready
from starmerge_models.errors import StarmergeError
from starmerge_models.spectral.factored import svd_factored
from starmerge_models.spectral.gram import svd_dense, svd_dense_bytes
from starmerge_models.spectral.svd import SVD, with_exact_fallback

_MANY = 16
"""Ratio of directions to wanted triplets from which iteration is cheapest."""

_MORE = 8
_SETTLED = 1e-5
_ROUNDING = 1e-12
_STEPS = 12
_PANEL = 2**22
_PIECE = 2**18
_SMALL = 2**21
"""Products of at most this many multiplications use float64: a matrix of few entries may be sums of
many products that cancel, for which float32 is not precise enough."""

_EPS = torch.finfo(torch.float32).eps


def leading(delta: LowRank, k: int) -> tuple[SVD, float]:
    """Return the first k singular triplets of a low-rank delta, the best approximation of rank k.

    For r factors of a matrix (m, n), the cheapest of three algorithms is used:

    - If r < 16(k + 8) and r ≤ min(m, n), from the core of the factors, O((m + n)r² + r³).
    - If 16(k + 8) is above min(m, n), from the product, O(mnr + mn·min(m, n)): there are more
      factors than the matrix has rows or columns, and the product takes less memory than they do.
    - Otherwise by block Krylov iteration (Musco and Musco, arXiv 1504.05477, algorithm 2): a random
      block of k + 8 columns is repeatedly multiplied by δᵀδ, all blocks are made orthonormal, and
      the triplets are those of δ on their span (Rayleigh and Ritz). The iteration ends when a step
      lowers the residual energy by less than 1e-5 of it, or after 12 steps. A step uses the
      factors, O((m + n)rk), or, if it takes no more memory than they do, their product, O(mnk),
      which is computed once, O(mnr). The random block is the same for the same shape.

    The core is computed in float64; so is the product of the second algorithm if r < 16(k + 8) or
    if it is small. Other products are computed in float32, from factors scaled by a power of two so
    that squares stay within float32's range. Triplets below float32's precision, 1.2e-7 of σ_1, are
    dropped, as the core drops directions that may be rounding. If factors nearly cancel, rounding
    is relative to the parts, not to their sum: for float32 products it is about 1e-7 of the parts'
    norm, and triplets and energies below that have no meaning.

    Args:
        delta: The delta, r factors.
        k: Number of triplets.

    Returns:
        At most k triplets, float64, and the residual energy ‖δ − U diag(S) Vᵀ‖². The energy is
        summed from the difference itself, or from the other singular values, because a difference
        of two energies would lose small residuals to rounding.

    Raises:
        StarmergeError: A factor or the scale has a NaN or an infinity.
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
        first = with_exact_fallback(decomposed, lambda sure: sure.first(k))
        # The longer side's vectors are images of the others, in the product's precision.
        U, V = first.U.double(), first.V.double()
        found = _ritz(U * first.S, V) if n < m else _transposed(_ritz(V * first.S, U))
        found, rank = _above_precision(found), _rank(decomposed.S)
        lost = float(decomposed.S[len(found.S) : rank].square().sum())
    else:
        found, lost = _iterated(delta, exponent, k)
    size = 2.0**exponent * abs(delta.scale)
    return SVD(found.U * math.copysign(1, delta.scale), found.S * size, found.V), lost * size**2


def leading_bytes(m: int, n: int, r: int, k: int) -> int:
    """Return an upper bound of the peak bytes of :func:`leading`, without its argument.

    Args:
        m: Rows of the delta.
        n: Columns of the delta.
        r: Upper bound of the number of factors, in float32. Fewer factors may need more memory,
            because they use the core.
        k: Number of triplets.
    """
    p, k = min(m, n), min(k, m, n, r)
    width = k + _MORE
    wanted, panel = _MANY * width, 4 * max(_PANEL, n, r)
    few = min(r, wanted, p)
    # A factor in float64 for its Gram matrix; then the matrices of the core.
    needs = [8 * max(m, n) * few + 64 * few**2]
    if wanted > p and r > p:
        # The product, and the float64 factors for it.
        product = 8 * m * n + max(8 * n * min(r, wanted) + 4 * panel, svd_dense_bytes(m, n, 8, k))
        needs.append(product)
    if wanted <= p and r >= wanted:
        # The product; the spans of both sides and their Gram matrix; several temporary blocks, also
        # for the residual.
        columns = _STEPS * width
        spans = 8 * (m + n) * columns + 5 * 8 * columns**2 + 8 * 8 * (m + n) * width
        needs.append((4 * m * n if m * n <= (m + n) * r else 0) + max(4 * panel, spans))
    return max(needs) + 24 * (m + n) * k


def _exponent(delta: LowRank) -> int:
    """Return the binary exponent of the largest entry of any B_j A_j."""
    sizes = [torch.maximum(rows.amax(1), -rows.amin(1)) for rows in (delta.B.T, delta.A)]
    largest = float((sizes[0].double() * sizes[1].double()).max())
    if not (math.isfinite(largest) and math.isfinite(delta.scale)):
        raise StarmergeError("A factor or the scale of the delta has a NaN or an infinity.")
    return math.frexp(largest)[1]


def _scaled_down(tensor: Tensor, exponent: int) -> Tensor:
    """Return tensor / 2^exponent, in two steps, because the power may exceed float32's range."""
    half = exponent // 2
    return tensor * 2.0**-half * 2.0 ** (half - exponent)


def _panels(delta: LowRank, exponent: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield B / 2^exponent by panels of rows."""
    m, n = delta.shape
    height = max(1, _PANEL // max(n, delta.rank))
    for start in range(0, m, height):
        rows = slice(start, start + height)
        yield rows, _scaled_down(delta.B[rows].to(dtype), exponent)


def _product(delta: LowRank, exponent: int, dtype: torch.dtype) -> Tensor:
    """Return B A / 2^exponent."""
    product = torch.empty(delta.shape, dtype=dtype, device=delta.device)
    A = delta.A.to(dtype)
    for rows, panel in _panels(delta, exponent, dtype):
        torch.mm(panel, A, out=product[rows])
    return product


def _iterated(delta: LowRank, exponent: int, k: int) -> tuple[SVD, float]:
    """Return the first k triplets of B A / 2^exponent by iteration, and the residual energy."""
    m, n = delta.shape
    product: Tensor | None = None
    if m * n <= (m + n) * delta.rank:
        product = _product(delta, exponent, torch.float32)
        matvec, rmatvec = product.__matmul__, product.T.__matmul__
    else:
        B, A = delta.B.float(), delta.A.float()
        matvec, rmatvec = (
            lambda X: B @ _scaled_down(A @ X, exponent),
            lambda Y: A.T @ _scaled_down(B.T @ Y, exponent),
        )
    # Iterate on the shorter side, whose basis is cheaper to make orthonormal.
    if n <= m:
        found = _krylov(matvec, rmatvec, (m, n), k, delta.device)
    else:
        found = _transposed(_krylov(rmatvec, matvec, (n, m), k, delta.device))
    found = _above_precision(found)
    left, right = (found.U * found.S).float(), found.V.T.float()
    if product is not None:
        return found, _energy(product.addmm_(left, right, alpha=-1))
    panels = _panels(delta, exponent, torch.float32)
    return found, sum(_energy((B @ A).addmm_(left[rows], right, alpha=-1)) for rows, B in panels)


def _krylov(
    matvec: Callable[[Tensor], Tensor],
    rmatvec: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    k: int,
    device: torch.device,
) -> SVD:
    """Return the first k triplets of an operator, float64; see :func:`leading`.

    Args:
        matvec: Multiplies float32 columns (n, w) by the operator.
        rmatvec: Multiplies float32 columns (m, w) by its transpose.
        shape: (m, n).
        k: Number of triplets.
        device: Device of the computation.
    """
    (m, n), width = shape, k + _MORE
    columns = _STEPS * width
    # Column-major, so that leading columns are contiguous.
    basis = torch.empty(columns, n, dtype=torch.float64, device=device).T
    images = torch.empty(columns, m, dtype=torch.float64, device=device).T
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=device)
    image = torch.randn(m, width, generator=torch.Generator().manual_seed(0)).to(device)
    end, energy = 0, 0.0
    for step in range(1, _STEPS + 1):
        fresh = _orthonormal_complement(basis[:, :end], rmatvec(image).double())
        if not fresh.shape[1]:
            break
        image = matvec(fresh.float())
        start, end = end, end + fresh.shape[1]
        basis[:, start:end], images[:, start:end] = fresh, image
        gram[:end, start:end] = images[:, :end].T @ images[:, start:end]
        if step < _STEPS:
            values = torch.linalg.eigvalsh(ready(gram[:end, :end]), UPLO="U")
            before, energy = energy, float(values[-k:].sum())
            # The other energy on the span is a part of the residual, so a lower bound of it.
            left = float(values[:-k].sum())
            if energy - before <= _SETTLED * left + _ROUNDING * energy:
                break
    if not end:  # the operator is zero
        return SVD(images[:, :0], gram.new_zeros(0), basis[:, :0])
    _, vectors = torch.linalg.eigh(ready(gram[:end, :end]), UPLO="U")
    first = vectors[:, -k:]
    # Repeat on the span of the triplets: squares of σ below 1e-8 of σ_1 are rounding in float64.
    return _ritz(images[:, :end] @ first, basis[:, :end] @ first)


def _orthonormal_complement(basis: Tensor, block: Tensor) -> Tensor:
    """Return an orthonormal basis of a block's part orthogonal to the span of a basis, float64."""
    for _ in range(2):
        size = torch.linalg.vector_norm(block, dim=0).max()
        block = block - basis @ (basis.T @ block)
        block, triangle = torch.linalg.qr(ready(block))
        scale = triangle.diagonal().abs()
        block = block[:, scale > 1e-10 * scale.max()]
        # If little of a column remains, its rounding error is large: orthogonalise again.
        if not block.shape[1] or bool((scale > 1e-5 * size).all()):
            break
    return block


def _ritz(images: Tensor, basis: Tensor) -> SVD:
    """Return the SVD of an operator on the span of an orthonormal basis, given the images."""
    Q, R = torch.linalg.qr(ready(images))
    P, S, Wh = torch.linalg.svd(R)
    return SVD(Q @ P, S, basis @ Wh.T)


def _transposed(found: SVD) -> SVD:
    """Return the triplets of the transpose."""
    return SVD(found.V, found.S, found.U)


def _energy(matrix: Tensor) -> float:
    """Return the sum of squares in float64, without a float64 copy of the whole matrix."""
    pieces = torch.split(matrix, max(1, _PIECE // matrix.shape[1]))
    return sum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in pieces)


def _rank(S: Tensor) -> int:
    """Return the number of singular values above float32's precision."""
    return int((_EPS * S[:1].sum() < S).sum())


def _above_precision(found: SVD) -> SVD:
    """Return the triplets that are above float32's precision."""
    return found.first(_rank(found.S))
