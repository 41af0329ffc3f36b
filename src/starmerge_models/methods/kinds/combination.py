"""Linear combinations of the weights, with coefficients that depend on their inner products.

Interpolation on the sphere and Model Stock are of this kind: whatever they do to angles and norms,
the Gram matrix of the base and the task vectors decides it, and the result is a sum Σ c_i v_i.
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
"""A square of a norm that is at most this share of its terms is rounding."""

Along = Literal["tensor", "rows", "columns"]
"""What counts as one vector: the tensor, each row (last axis), each column (first axis)."""

Solve = Callable[[Tensor], Tensor]
"""From Gram matrices (..., K, K) float64 to coefficients (..., K) float64."""


def combine(vectors: Sequence[Delta], solve: Solve, tensor: TensorContext, along: Along) -> Delta:
    """Return Σ c_i v_i with coefficients that are found from the inner products ⟨v_i, v_j⟩.

    Inner products and sum are taken in float64 panels, and the result is rounded once. Where the
    tensor is one vector, and all that have a coefficient are low-rank, the result stays so.

    Args:
        vectors: K operators of one shape: task vectors, and the base as a :class:`Dense`.
        solve: Finds the coefficients.
        tensor: The tensor. With fewer than two dimensions it is one vector.
        along: What counts as one vector.
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
    """Return the bytes at the peak of :func:`combine`, of the task vectors that it holds too.

    Panels, the float32 result, and with columns the inner products of each.

    Args:
        tensor: The tensor.
        along: What counts as one vector.
        with_base: Whether the base is one of the vectors.
    """
    if combined_shape(tensor, along, with_base=with_base).rank is not None:
        own = set(tensor.deltas)
        pairs = max(inner_bytes(tensor, [left, right]) for left in own for right in own)
        return tensor.held + max(total_bytes(tensor), pairs)
    K = tensor.tasks + with_base
    products = 16 * tensor.matrix[1] * K * K if along == "columns" else 0
    # All vectors are stacked, in float32 and in float64, and multiplied by the coefficients.
    stacked = panel_bytes(tensor, 2 * K, numbers=2 * K + 2)
    return tensor.held + stacked + products + 4 * tensor.size


def combined_shape(tensor: TensorShape, along: Along, *, with_base: bool) -> DeltaShape:
    """Return what :func:`combine` makes: a low-rank sum where the tensor is one vector."""
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
    assert tensor.base is not None, "the merge says that it needs the base"
    return Dense(tensor.base)


def every_task(deltas: Deltas, tensor: TensorContext) -> list[Delta]:
    """Return the deltas of all T tasks: of those that leave the tensor alone, zeros of rank 0."""
    held = dict(deltas.items())
    m, n = matrix_shape(tensor.shape)
    zero = LowRank(torch.zeros(m, 0, dtype=torch.float32), torch.zeros(0, n, dtype=torch.float32))
    return [held.get(t, zero) for t in range(len(tensor.tasks))]


def weights_gram(products: Tensor) -> Tensor:
    """Turn the Gram matrix of W_0, τ_1, …, τ_T into that of W_0, W_1, …, W_T, (..., T+1, T+1).

    Where τ_t is −W_0 but for rounding, W_t counts as zero: ‖W_t‖² ≤ 1e-14 (‖W_0‖² + ‖τ_t‖²) may be
    negative, and its angles are any.
    """
    M = torch.eye(products.shape[-1], dtype=torch.float64)
    M[1:, 0] = 1
    G = M @ products @ M.T
    terms = products.diagonal(dim1=-2, dim2=-1)
    vanished = G.diagonal(dim1=-2, dim2=-1) <= _VANISHED * (terms[..., :1] + terms)
    return torch.where(vanished[..., :, None] | vanished[..., None, :], 0.0, G)


def lengths(G: Tensor) -> Tensor:
    """Return the norms (..., K) that Gram matrices (..., K, K) tell; 0 for a negative square.

    Factors whose terms cancel leave rounding, which may be negative.
    """
    return G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def update(c: Tensor) -> Tensor:
    """Turn Σ c_t W_t over t = 0 … T into coefficients of W_0, τ_1, …, τ_T, less the base itself."""
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
