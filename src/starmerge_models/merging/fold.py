"""Adding a merged delta to a weight."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, LowRank, compute_dtype

FOLD_ENTRIES = 2**19
"""Entries of a weight in one panel, which has whole rows and at least one."""


class Fold:
    """Adds a delta to a weight in float32 and rounds once to the output's dtype.

    For a float64 weight the sum is float64. The weight is processed in panels of rows, about
    :data:`FOLD_ENTRIES` entries each, in reused buffers that fit into the CPU's cache. The panels
    depend on the shape alone.

    Args:
        base: The base's tensor, any shape and floating dtype.
        delta: The merged delta, of the same matrix shape.
        dtype: Dtype of the result.
    """

    def __init__(self, base: Tensor, delta: Delta, dtype: torch.dtype) -> None:
        self._base = base
        self._delta = delta
        self._dtype = dtype
        self._update_energy = self._error_energy = 0.0

    def panels(self, merged: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield the panels of the merged weight, each with the index of its first entry.

        Args:
            merged: Buffer (m, n) in the output's dtype for the result; without it, each panel
                overwrites the one before.
        """
        weight, dtype = self._base.reshape(self._delta.shape), self._dtype
        m, n = self._delta.shape
        height = max(1, min(m, FOLD_ENTRIES // max(1, n)))
        exact, total = torch.empty(2, height, n, dtype=compute_dtype(weight.dtype))
        panel = torch.empty(0 if merged is not None else height, n, dtype=dtype)
        rows_of = _rows(self._delta, height)
        # Rounding of the base itself to the output's dtype is not part of the update.
        is_exact = torch.promote_types(weight.dtype, dtype) == dtype
        for start in range(0, m, height):
            rows = slice(start, min(start + height, m))
            count = rows.stop - start
            before, after = exact[:count], total[:count]
            rounded = panel[:count] if merged is None else merged[rows]
            update = rows_of(rows)
            before.copy_(weight[rows])
            rounded.copy_(torch.add(before, update, out=after))
            if not is_exact:
                before.copy_(before.to(dtype))
            error = after.copy_(rounded).sub_(before).sub_(update)
            self._error_energy += _energy(error, before)
            self._update_energy += _energy(update, before)
            yield start * n, rounded

    @property
    def update_norm(self) -> float:
        """Frobenius norm ‖Δ‖ of the delta, over the panels so far."""
        return math.sqrt(self._update_energy)

    @property
    def survived(self) -> float:
        """Share of the update that survives the rounding to the output's dtype.

        It is 1 − ‖e‖²/‖Δ‖², where e is the rounding error of the update; at least 0, and 1 for a
        zero delta.
        """
        if not self._update_energy:
            return 1.0
        return max(0.0, 1.0 - self._error_energy / self._update_energy)


def fold_bytes(m: int, n: int, r: int = 0) -> int:
    """Return an upper bound of the bytes of :class:`Fold` for a weight (m, n), without the delta.

    Each entry of a panel takes the weight, the sum, the added value (each float32, or float64 for a
    float64 weight), and the rounded sum. A low-rank delta takes its factors in float32, and a
    second copy while zero factors are removed.

    Args:
        m: Rows of the weight.
        n: Columns of the weight.
        r: Upper bound of the delta's number of factors; 0 for a dense delta.
    """
    return (3 * 8 + 4) * min(m * n, max(FOLD_ENTRIES, n)) + 8 * r * (m + n)


@dataclass(frozen=True)
class Folded:
    """A weight with an added delta, and the statistics of :class:`Fold`."""

    weight: Tensor
    """The merged tensor, in the output's dtype."""
    update_norm: float
    survived: float


def fold(base: Tensor, delta: Delta, dtype: torch.dtype) -> Folded:
    """Add a delta to a weight in memory; see :class:`Fold`."""
    merged, adding = _allocated(*delta.shape, dtype), Fold(base, delta, dtype)
    for _ in adding.panels(merged):
        pass
    return Folded(merged.reshape(base.shape), adding.update_norm, adding.survived)


def _allocated(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor (m, n), in huge pages if the system supports them.

    The first access to a page causes a page fault; with small pages the faults take a quarter of
    the time of a fold.
    """
    nbytes = m * n * dtype.itemsize
    if nbytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(m, n, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(m, n)


_LARGE = 2**22


def factors_of(delta: LowRank) -> tuple[Tensor, Tensor]:
    """Return the factors whose product is added to a weight: (m, r) and (r, n), float32.

    Zero factors are removed and the others made contiguous, so that an adapter gives the same bytes
    if it is padded to a higher rank or read from a file.
    """
    left = torch.empty(delta.B.shape, dtype=torch.float32, device=delta.device)
    left.copy_(delta.B).mul_(delta.scale)
    right = delta.A.float()
    alive = left.any(0) & right.any(1)
    if not alive.all():
        left, right = left[:, alive], right[alive]
    return left.contiguous(), right.contiguous()


def _rows(delta: Delta, height: int) -> Callable[[slice], Tensor]:
    """Return a function of up to ``height`` rows of a delta in float32, in a reused buffer."""
    if not isinstance(delta, LowRank):
        return delta.entries
    left, right = factors_of(delta)
    product = torch.empty(height, right.shape[1], dtype=torch.float32)
    return lambda rows: torch.mm(left[rows], right, out=product[: rows.stop - rows.start])


def _energy(panel: Tensor, scratch: Tensor) -> float:
    """Return the sum of squares of a panel's entries, to about 1e-8 of it.

    Blocks of 1024 entries are summed in float32, and the sums of blocks in float64, which is three
    times as fast as float64 throughout. If squares may underflow or overflow, float64 is used
    throughout.

    Args:
        panel: (rows, n) float32 or float64.
        scratch: Buffer (rows, n) float32 or float64, which is overwritten.
    """
    squares = torch.mul(panel, panel, out=scratch).view(-1)
    whole = len(squares) // 1024 * 1024
    sums = squares[:whole].view(-1, 1024).sum(1)
    energy = float(sums.sum(dtype=torch.float64) + squares[whole:].sum(dtype=torch.float64))
    if 1e-24 < energy < 1e36:
        return energy
    return float(torch.linalg.vector_norm(panel, dtype=torch.float64)) ** 2
