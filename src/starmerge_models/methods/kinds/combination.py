"""Linear combinations of weights whose coefficients depend only on their inner products.

Spherical interpolation and Model Stock are such merges: angles and norms follow from the Gram
matrix of the base and the task vectors, and the result is a sum Σ c_i v_i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank, matrix_shape, total
from starmerge_models.methods.kinds.entrywise import panel_bytes, panels, stacked
from starmerge_models.methods.memory import (
    DeltaShape,
    TensorShape,
    dense_shape,
    inner_bytes,
    total_bytes,
    total_shape,
)
from starmerge_models.methods.method import Deltas, TensorContext

_VANISHED = 1e-14
"""A squared norm of at most this share of its terms is treated as rounding, that is as zero."""

Along = Literal["tensor", "rows", "columns"]
"""The vectors of a tensor: the whole tensor, its rows (last axis), or its columns (first axis)."""

Solve = Callable[[Tensor], Tensor]
"""A function from Gram matrices (..., K, K) float64 to coefficients (..., K) float64."""


def combine(vectors: Sequence[Delta], solve: Solve, tensor: TensorContext, along: Along) -> Delta:
    """Return Σ c_i v_i with coefficients computed from the inner products ⟨v_i, v_j⟩.

    Inner products and the sum are computed in float64, by panels of rows, and the result is rounded
    once. If the tensor is one vector and all v_i with a nonzero coefficient are low-rank, the
    result is low-rank too.

    Args:
        vectors: K operators of one shape: task vectors, and the base as a :class:`Dense`.
        solve: Computes the coefficients.
        tensor: The tensor. With fewer than two dimensions it is one vector.
        along: Whether the tensor, each row or each column is one vector.
    """
    if 0 in tensor.shape:
        return Dense(torch.zeros(matrix_shape(tensor.shape), dtype=torch.float32))
    if along == "tensor" or len(tensor.shape) < 2:
        c = solve(gram(vectors))
        used = [v for v, c_i in zip(vectors, c, strict=True) if c_i != 0]
        if all(isinstance(v, LowRank) for v in used):
            scaled = [v.scaled(float(c_i)) for v, c_i in zip(vectors, c, strict=True) if c_i != 0]
            return total(scaled or [vectors[-1].scaled(0.0)])
        whole = c[c != 0][:, None, None]
        return _summed(used, lambda panel: whole)
    if along == "columns":
        count, n = len(vectors), vectors[0].shape[1]
        products = torch.zeros(n, count, count, dtype=torch.float64)
        for _, panel in _panels(vectors):
            products += torch.einsum("irn,jrn->nij", panel, panel)
        columns = solve(products).T[:, None]
        return _summed(vectors, lambda panel: columns)
    length = tensor.shape[-1]

    def by_row(panel: Tensor) -> Tensor:
        rows = panel.reshape(len(panel), -1, length).transpose(0, 1)
        return solve(rows @ rows.mT).T.repeat_interleave(length, 1).reshape(panel.shape)

    return _summed(vectors, by_row)


def combine_bytes(tensor: TensorShape, along: Along, *, with_base: bool) -> int:
    """Return the peak memory of :func:`combine` in bytes, including the task vectors it holds.

    It counts panels, the float32 result, and with columns the inner products of each column.

    Args:
        tensor: The tensor.
        along: Whether the tensor, each row or each column is one vector.
        with_base: Whether the base is one of the vectors.
    """
    if combined_shape(tensor, along, with_base=with_base).rank is not None:
        own = set(tensor.deltas)
        pairs = max(inner_bytes(tensor, [left, right]) for left in own for right in own)
        return tensor.deltas_nbytes + max(total_bytes(tensor), pairs)
    K = tensor.tasks + with_base
    products = 16 * tensor.matrix[1] * K * K if along == "columns" else 0
    # combine stacks all vectors, in float32 and in float64, and multiplies by the coefficients.
    stacked = panel_bytes(tensor, 2 * K, numbers=2 * K + 2)
    return tensor.deltas_nbytes + stacked + products + 4 * tensor.size


def combined_shape(tensor: TensorShape, along: Along, *, with_base: bool) -> DeltaShape:
    """Return the shape of the result of :func:`combine`: low-rank if the tensor is one vector."""
    is_one = along == "tensor" or len(tensor.shape) < 2
    if is_one and not with_base and not tensor.has_dense:
        return total_shape(tensor)
    return dense_shape(tensor)


def gram(vectors: Sequence[Delta]) -> Tensor:
    """Return the Frobenius inner products of K operators of one shape, (K, K) float64."""
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    if all(isinstance(v, LowRank) for v in vectors):
        for i, left in enumerate(vectors):
            for j, right in enumerate(vectors[: i + 1]):
                products[i, j] = products[j, i] = left.inner(right)
        return products
    for _, panel in _panels(vectors):
        flat = panel.flatten(1)
        products += flat @ flat.T
    return products


def base_weight(tensor: TensorContext) -> Dense:
    """Return the base's weight as an operator, for merges that need the base."""
    assert tensor.base is not None, "a merge with needs_base is given the base"
    return Dense(tensor.base)


def deltas_of_all_tasks(deltas: Deltas, tensor: TensorContext) -> list[Delta]:
    """Return the deltas of all T tasks; zeros of rank 0 for tasks that do not change the tensor."""
    held = dict(deltas.items())
    m, n = matrix_shape(tensor.shape)
    zero = LowRank(torch.zeros(m, 0, dtype=torch.float32), torch.zeros(0, n, dtype=torch.float32))
    return [held.get(t, zero) for t in range(len(tensor.tasks))]


def weights_gram(products: Tensor) -> Tensor:
    """Return the Gram matrix of W_0, W_1, …, W_T from that of W_0, τ_1, …, τ_T, (..., T+1, T+1).

    If τ_t is −W_0 up to rounding, that is ‖W_t‖² ≤ 1e-14 (‖W_0‖² + ‖τ_t‖²), W_t is set to zero:
    the computed ‖W_t‖² may be negative, and the angles of W_t are arbitrary.
    """
    M = torch.eye(products.shape[-1], dtype=torch.float64)
    M[1:, 0] = 1
    G = M @ products @ M.T
    terms = products.diagonal(dim1=-2, dim2=-1)
    vanished = G.diagonal(dim1=-2, dim2=-1) <= _VANISHED * (terms[..., :1] + terms)
    return torch.where(vanished[..., :, None] | vanished[..., None, :], 0.0, G)


def gram_norms(G: Tensor) -> Tensor:
    """Return the norms (..., K) of the vectors with Gram matrices (..., K, K).

    The norm is 0 where a square is negative, which is rounding of factors whose terms cancel.
    """
    return G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def task_vector_coefficients(c: Tensor) -> Tensor:
    """Return the coefficients of W_0, τ_1, …, τ_T in Σ c_t W_t − W_0, t = 0 … T."""
    return torch.cat([c.sum(-1, keepdim=True) - 1, c[..., 1:]], -1)


def _summed(vectors: Sequence[Delta], coefficients: Callable[[Tensor], Tensor]) -> Dense:
    merged = torch.empty(vectors[0].shape, dtype=torch.float32)
    for rows, panel in _panels(vectors):
        merged[rows] = (coefficients(panel) * panel).sum(0).float()
    return Dense(merged)


def _panels(vectors: Sequence[Delta]) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows, and those rows of all vectors, (K, rows, n) float64."""
    for rows in panels(vectors[0].shape, len(vectors)):
        yield rows, stacked(vectors, rows)
