"""What an adapter's file says of one weight: which tensors its change is made of, and how.

Each format reads its files into :class:`Update` objects; all that follows, from the check against
the base to the merge, knows no format. A :class:`Change` gives the matrix (out, in·k) of an update
as factors where it has them, with the scale that the tool multiplies it by.
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
"""Returns a stored tensor by its key, in the dtype it is stored in."""

_PANEL = 2**22
"""Entries that are held in float64 at once."""


class Change(Protocol):
    """A way in which stored tensors make the change of a weight."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors that it is made of."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, …) as torch's modules hold the weight.

        Where the file does not keep the kernel's sizes apart it is (out, in·k).
        """

    @property
    def rank(self) -> int | None:
        """The rank of its factors; None where it is dense."""

    def delta(self, read: Read) -> Delta:
        """Return it as a matrix (out, in·k), scale included."""


@dataclass(frozen=True)
class Magnitude:
    """DoRA's magnitudes: the norms that slices of the changed weight are given."""

    key: str
    axis: int = 0
    """The axis of (out, in, …) along which there is one for each slice: 0 outputs, 1 inputs."""
    epsilon: float = 0.0
    """What the tool adds to the norms that it divides by."""


@dataclass(frozen=True)
class Update:
    """The change of one weight."""

    module: str
    """The module's name as the file has it."""
    change: Change
    is_embedding: bool = False
    """Whether the module looks rows up: its weight is the transpose of the change."""
    magnitude: Magnitude | None = None
    parameter: str = "weight"
    """Which of the module's parameters is changed."""

    @property
    def weight(self) -> str:
        """The name of the weight that is updated, as the file has the module's."""
        return f"{self.module}.{self.parameter}"

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors that are read for it."""
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
    """Which row of B is which output of the weight; None: each its own."""

    @property
    def keys(self) -> tuple[str, ...]:
        """A and B."""
        return self.a, self.b

    def delta(self, read: Read) -> LowRank:
        """Return s·B·A in factors, in the dtypes they are stored in."""
        A, B = read(self.a), read(self.b)
        if self.input_first:
            A, B = A.T, B.T
        A, B = A.flatten(1), B.flatten(1)
        return LowRank(B if self.rows is None else B[list(self.rows)], A, self.scale)


@dataclass(frozen=True)
class ExpertProduct:
    """LoRA's s·B·A of one of several experts whose factors are stored together, as PEFT does.

    A is (E·r, in), expert after expert; B is (out, r·E), in which the columns of an expert are
    every E-th. Source: github.com/huggingface/peft, ``tuners/lora/layer.py``, ``ParamWrapper``.
    """

    a: str
    b: str
    scale: float
    shape: tuple[int, ...]
    rank: int
    expert: int
    experts: int
    """E."""
    transposed: bool
    """Whether the weight's change is (B·A)ᵀ."""
    start: int = 0
    """The first row of the expert's change that is one of this weight."""

    @property
    def keys(self) -> tuple[str, ...]:
        """A and B, of all experts."""
        return self.a, self.b

    def delta(self, read: Read) -> LowRank:
        """Return the expert's s·B·A in factors, in the dtypes they are stored in."""
        A, B = read(self.a), read(self.b)
        A = A.view(self.experts, self.rank, -1)[self.expert]
        B = B.view(len(B), self.rank, self.experts)[:, :, self.expert]
        left, right = (A.T, B.T) if self.transposed else (B, A)
        return LowRank(left[self.start : self.start + self.shape[0]], right, self.scale)


@dataclass(frozen=True)
class Blocks:
    """Changes of some of the rows of a weight, one below the other.

    Args:
        parts: The first row of each, and the change of these rows.
        shape: Of the whole weight.
    """

    parts: tuple[tuple[int, Change], ...]
    shape: tuple[int, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of all."""
        return tuple(key for _, change in self.parts for key in change.keys)

    @property
    def rank(self) -> int | None:
        """The sum of the ranks."""
        ranks = [change.rank for _, change in self.parts]
        known = [rank for rank in ranks if rank is not None]
        return sum(known) if len(known) == len(ranks) else None

    def delta(self, read: Read) -> Delta:
        """Return it in factors, B with a block for each part, A with their rows; or dense.

        In float32, or in float64 where a part is stored so.
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
    """A matrix P·Q (out, in·k) of two stored tensors, with a core between them or without one.

    Without a core P is (out, r) and Q (r, in·k). With a core t (r, r', …) LyCORIS stores P as
    (r, out) and Q as (r', in).
    """

    p: str
    q: str
    core: str | None
    rank: int

    @property
    def keys(self) -> tuple[str, ...]:
        """Its tensors."""
        return (self.p, self.q, *((self.core,) if self.core else ()))

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """Return P (out, r) and Q (r, in·k), as they are stored, or in float64."""
        P, Q = read(self.p), read(self.q)
        if self.core is None:
            return P, Q
        return P.T.contiguous(), _contracted(read(self.core), Q)


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix that is stored as it is, (out, in, …)."""

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
        """r₁·r₂, where the matrix has more rows and columns."""
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

    Either matrix is stored whole or as a product. With W₁ = P₁Q₁ and W₂ = P₂Q₂ the factors are
    P₁ ⊗ P₂ and Q₁ ⊗ Q₂; a whole matrix stands for one of its factors, and the identity for the
    other, whichever is smaller.
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
        """The product of both ranks, where the matrix has more rows and columns."""
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
    """A change that is stored entry by entry."""

    key: str
    shape: tuple[int, ...]

    rank = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.key,)

    def delta(self, read: Read) -> Dense:
        """Return it in the dtype it is stored in."""
        return Dense(read(self.key))


def _contracted(core: Tensor, q: Tensor) -> Tensor:
    """Return Σ_n core[m, n, …] · q[n, i] as (m, i·k), in float64."""
    return torch.einsum("mn...,ni->mi...", core.double(), q.double()).flatten(1)


def _split(part: FactoredMatrix | StoredMatrix, read: Read) -> tuple[Tensor, Tensor]:
    """Return two factors of a part, no larger than they need to be."""
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
