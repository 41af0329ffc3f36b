"""Updates of an adapter: how the change of a weight is computed from stored tensors.

Each format reads its files into :class:`Update` objects; all later steps, from the check against
the base to the merge, are independent of the format. A :class:`Change` returns the matrix
(out, in·k) of an update, as factors if possible, including the tool's scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank, compute_dtype

Read: TypeAlias = Callable[[str], Tensor]
"""A function that returns a stored tensor by its key, in its stored dtype."""

_PANEL = 2**22
"""Entries in one float64 panel."""


class Change(Protocol):
    """A formula that computes the change of a weight from stored tensors."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the stored tensors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, …) in the layout of torch's modules.

        It is (out, in·k) if the file does not contain the kernel's sizes.
        """

    @property
    def rank(self) -> int | None:
        """The rank of its factors; None where it is dense."""

    def delta(self, read: Read) -> Delta:
        """Return the change as a matrix (out, in·k), including the scale."""


@dataclass(frozen=True)
class Magnitude:
    """DoRA's magnitudes: the norms of the slices of the changed weight."""

    key: str
    axis: int = 0
    """The axis of (out, in, …) whose slices have a magnitude each: 0 for outputs, 1 for inputs."""
    epsilon: float = 0.0
    """The number that the tool adds to norms before it divides by them."""


@dataclass(frozen=True)
class Update:
    """The change of one weight."""

    module: str
    """The module's name in the file."""
    change: Change
    is_embedding: bool = False
    """Whether the module is an embedding, whose weight is the transpose of the change."""
    magnitude: Magnitude | None = None
    parameter: str = "weight"
    """The name of the changed parameter of the module."""

    @property
    def weight(self) -> str:
        """The file's name of the updated weight."""
        return f"{self.module}.{self.parameter}"

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the tensors that are read for it."""
        magnitude = () if self.magnitude is None else (self.magnitude.key,)
        return (*self.change.keys, *magnitude)

    @property
    def rank(self) -> int | None:
        """The rank of its factors; None where it is dense."""
        return None if self.magnitude else self.change.rank


@dataclass(frozen=True)
class Product:
    """LoRA's s·B·A (Hu et al. 2021, arXiv 2106.09685).

    B is (out, r) or, of a convolution, (out, r, 1, …); A is (r, in, …). Input-first tools store
    their transposes.
    """

    a: str
    b: str
    scale: float
    shape: tuple[int, ...]
    rank: int
    input_first: bool = False
    """Whether the file has Aᵀ (in, r) and Bᵀ (r, out)."""
    rows: tuple[int, ...] | None = None
    """The row of B for each output of the weight; None for the same order."""

    @property
    def keys(self) -> tuple[str, ...]:
        """A and B."""
        return self.a, self.b

    def delta(self, read: Read) -> LowRank:
        """Return s·B·A as factors, in their stored dtypes."""
        A, B = read(self.a), read(self.b)
        if self.input_first:
            A, B = A.T, B.T
        A, B = A.flatten(1), B.flatten(1)
        return LowRank(B if self.rows is None else B[list(self.rows)], A, self.scale)


@dataclass(frozen=True)
class ExpertProduct:
    """LoRA's s·B·A of one of several experts with joined factors, in PEFT's layout.

    A is (E·r, in), expert after expert; B is (out, r·E), where every E-th column belongs to the
    same expert. Source: github.com/huggingface/peft, ``tuners/lora/layer.py``, ``ParamWrapper``.
    """

    a: str
    b: str
    scale: float
    shape: tuple[int, ...]
    rank: int
    expert: int
    experts: int
    """E, the number of experts."""
    transposed: bool
    """Whether the weight's change is (B·A)ᵀ."""
    start: int = 0
    """The first row of the expert's change that belongs to this weight."""

    @property
    def keys(self) -> tuple[str, ...]:
        """A and B, of all experts."""
        return self.a, self.b

    def delta(self, read: Read) -> LowRank:
        """Return the expert's s·B·A as factors, in their stored dtypes."""
        A, B = read(self.a), read(self.b)
        A = A.view(self.experts, self.rank, -1)[self.expert]
        B = B.view(len(B), self.rank, self.experts)[:, :, self.expert]
        left, right = (A.T, B.T) if self.transposed else (B, A)
        return LowRank(left[self.start : self.start + self.shape[0]], right, self.scale)


@dataclass(frozen=True)
class Blocks:
    """Changes of consecutive blocks of rows of a weight.

    Args:
        parts: The first row and the change of each block.
        shape: Shape of the whole weight.
    """

    parts: tuple[tuple[int, Change], ...]
    shape: tuple[int, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the tensors of all blocks."""
        return tuple(key for _, change in self.parts for key in change.keys)

    @property
    def rank(self) -> int | None:
        """The sum of the ranks."""
        ranks = [change.rank for _, change in self.parts]
        known = [rank for rank in ranks if rank is not None]
        return sum(known) if len(known) == len(ranks) else None

    def delta(self, read: Read) -> Delta:
        """Return the change as factors, with a block of B and rows of A for each part; or dense.

        The dtype is float32, or float64 if a part is stored in float64.
        """
        deltas = [(start, change.delta(read)) for start, change in self.parts]
        low = [(start, delta) for start, delta in deltas if isinstance(delta, LowRank)]
        factors = [t for _, delta in low for t in (delta.B, delta.A)]
        dense = [delta.matrix for _, delta in deltas if isinstance(delta, Dense)]
        dtype = reduce(torch.promote_types, (t.dtype for t in factors + dense), torch.float32)
        if len(low) < len(deltas):
            whole = torch.zeros(self.shape, dtype=dtype)
            for start, delta in deltas:
                whole[start : start + delta.shape[0]] = delta.to_dense()
            return Dense(whole)
        B = torch.zeros(self.shape[0], sum(delta.rank for _, delta in low), dtype=dtype)
        column = 0
        for start, delta in low:
            block = B[start : start + delta.shape[0], column : column + delta.rank]
            block.copy_(delta.B).mul_(delta.scale)
            column += delta.rank
        return LowRank(B, torch.cat([delta.A.to(dtype) for _, delta in low]))


@dataclass(frozen=True)
class Tucker:
    """LyCORIS' LoCon with a core: s·Σ_mn up[o, m] · mid[m, n, …] · down[n, i].

    The core is contracted into A, so that its rank is that of B = up.
    """

    up: str
    mid: str
    down: str
    scale: float
    shape: tuple[int, ...]
    rank: int

    @property
    def keys(self) -> tuple[str, ...]:
        """The three tensors."""
        return self.up, self.mid, self.down

    def delta(self, read: Read) -> LowRank:
        """Return s·B·A; A in float32 or wider, rounded once."""
        up, mid, down = read(self.up), read(self.mid), read(self.down)
        A = _contracted(mid, down.flatten(1)).to(
            compute_dtype(torch.promote_types(mid.dtype, down.dtype))
        )
        return LowRank(up.flatten(1), A, self.scale)


@dataclass(frozen=True)
class FactoredMatrix:
    """A matrix P·Q (out, in·k) of two stored tensors, with or without a core between them.

    Without a core P is (out, r) and Q (r, in·k). With a core t (r, r', …) LyCORIS stores P as
    (r, out) and Q as (r', in).
    """

    p: str
    q: str
    core: str | None
    rank: int

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of its tensors."""
        return (self.p, self.q, *((self.core,) if self.core else ()))

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """Return P (out, r) and Q (r, in·k), in the stored dtype, or in float64 with a core."""
        P, Q = read(self.p), read(self.q)
        if self.core is None:
            return P, Q
        return P.T.contiguous(), _contracted(read(self.core), Q)


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix that is stored whole, (out, in, …)."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.key,)

    def factors(self, read: Read) -> tuple[Tensor, None]:
        """Return it as a matrix, and no second factor."""
        return read(self.key).flatten(1), None


@dataclass(frozen=True)
class Hadamard:
    """LoHa's s·(P₁Q₁ ⊙ P₂Q₂) (Hyeon-Woo et al. 2022, arXiv 2108.06098, equation 3).

    The entrywise product of matrices of ranks r₁ and r₂ has the factors P₁ ∗ P₂, all products of a
    column of one and one of the other, and likewise of the rows of Q₁ and Q₂.
    """

    first: FactoredMatrix
    second: FactoredMatrix
    scale: float
    shape: tuple[int, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of both."""
        return *self.first.keys, *self.second.keys

    @property
    def rank(self) -> int | None:
        """r₁·r₂, if the matrix has more rows and columns, else None."""
        r = self.first.rank * self.second.rank
        return r if r < min(self.shape[0], math.prod(self.shape[1:])) else None

    def delta(self, read: Read) -> Delta:
        """Return the factors, or the dense matrix; in float32 or wider, rounded once."""
        (P1, Q1), (P2, Q2) = (half.factors(read) for half in (self.first, self.second))
        dtype = compute_dtype(torch.promote_types(P1.dtype, P2.dtype))
        P1, Q1, P2, Q2 = (factor.double() for factor in (P1, Q1, P2, Q2))
        if self.rank is not None:
            B = (P1[:, :, None] * P2[:, None, :]).flatten(1)
            A = (Q1[:, None, :] * Q2[None, :, :]).flatten(0, 1)
            return LowRank(B.to(dtype), A.to(dtype), self.scale)
        delta = torch.empty(len(P1), Q1.shape[1], dtype=dtype)
        for rows in _panels(delta.shape):
            delta[rows] = (P1[rows] @ Q1).mul_(P2[rows] @ Q2).mul_(self.scale)
        return Dense(delta)


@dataclass(frozen=True)
class Kronecker:
    """LoKr's s·(W₁ ⊗ W₂) (Edalati et al. 2022, arXiv 2212.10650; Yeh et al. 2023, 2309.14859).

    Each matrix is stored whole or as a product. With W₁ = P₁Q₁ and W₂ = P₂Q₂ the factors are
    P₁ ⊗ P₂ and Q₁ ⊗ Q₂; a whole matrix is factored into itself and the identity of its shorter
    side.
    """

    first: FactoredMatrix | StoredMatrix
    second: FactoredMatrix | StoredMatrix
    scale: float
    shape: tuple[int, ...]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    """(rows, columns) of W₁, and of W₂ as a matrix (out, in·k)."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of both."""
        return *self.first.keys, *self.second.keys

    @property
    def rank(self) -> int | None:
        """The product of both ranks, if the matrix has more rows and columns, else None."""
        parts = zip((self.first, self.second), self.sizes, strict=True)
        r = math.prod(
            min(part.rank, *size) if isinstance(part, FactoredMatrix) else min(size)
            for part, size in parts
        )
        return r if r < min(self.shape[0], math.prod(self.shape[1:])) else None

    def delta(self, read: Read) -> Delta:
        """Return the factors, or the dense matrix; in float32 or wider, rounded once."""
        (P1, Q1), (P2, Q2) = (_split(part, read) for part in (self.first, self.second))
        dtype = compute_dtype(torch.promote_types(P1.dtype, P2.dtype))
        P1, Q1, P2, Q2 = (factor.double() for factor in (P1, Q1, P2, Q2))
        if self.rank is not None:
            B, A = torch.kron(P1, P2), torch.kron(Q1, Q2)
            return LowRank(B.to(dtype), A.to(dtype), self.scale)
        W1, W2 = P1 @ Q1, (P2 @ Q2).mul_(self.scale)
        delta = torch.empty(len(W1) * len(W2), W1.shape[1] * W2.shape[1], dtype=dtype)
        for row in range(len(W1)):
            delta[row * len(W2) : (row + 1) * len(W2)] = torch.kron(W1[row : row + 1], W2)
        return Dense(delta)


@dataclass(frozen=True)
class Difference:
    """A change that is stored as a full tensor."""

    key: str
    shape: tuple[int, ...]

    rank = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.key,)

    def delta(self, read: Read) -> Dense:
        """Return the change in its stored dtype."""
        return Dense(read(self.key))


def _contracted(core: Tensor, q: Tensor) -> Tensor:
    """Return Σ_n core[m, n, …] · q[n, i] as (m, i·k), in float64."""
    return torch.einsum("mn...,ni->mi...", core.double(), q.double()).flatten(1)


def _split(part: FactoredMatrix | StoredMatrix, read: Read) -> tuple[Tensor, Tensor]:
    """Return two factors of a part, of minimal size."""
    P, Q = part.factors(read)
    if Q is not None and P.shape[1] <= min(len(P), Q.shape[1]):
        return P, Q
    whole = P if Q is None else P.double() @ Q.double()
    rows, columns = whole.shape
    if rows <= columns:
        return torch.eye(rows, dtype=whole.dtype), whole
    return whole, torch.eye(columns, dtype=whole.dtype)


def _panels(shape: tuple[int, ...]) -> list[slice]:
    rows = max(1, _PANEL // max(1, shape[1]))
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]
