"""Exact selection of the k-th largest magnitude among more numbers than fit into memory.

Non-negative floats sort like their bits read as integers. A histogram over the upper bits of a
sample brackets the k-th largest number. Then one pass over all numbers counts those above the
bracket and collects the few inside. If the bracket of the sample misses the number, the histogram
is computed of all numbers, so the result is exact in every case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from torch import Tensor

_LOWER = 17
BUCKETS = (0x7F80_0000 >> _LOWER) + 1
"""Length of a histogram: the last bucket is that of infinity; the sign bit is not used."""
SAMPLE = 17
"""Stride of the sample, over numbers or rows.

An odd stride samples all phases of data that is periodic in a power of two.
"""
_MOST_ADDED = 2**18
_FEW = 2**15


def histogram(parts: Iterable[Tensor], count: int) -> npt.NDArray[np.float64]:
    """Count magnitudes by the upper 15 of their 32 bits.

    Args:
        parts: float32, any shape, no NaN: all of the numbers, or a sample.
        count: Number of all numbers. The counts of a sample are scaled to it.

    Returns:
        (BUCKETS,), exact below 2⁵³ without sampling. The histogram of a union is the sum of the
        histograms.
    """
    counts, seen = np.zeros(BUCKETS), 0
    for part in parts:
        bits = _magnitudes(part)
        counts += np.bincount(bits >> _LOWER, minlength=BUCKETS)
        seen += len(bits)
    if seen not in (0, count):
        counts *= count / seen
    return counts


def bracket(counts: npt.NDArray[np.float64], k: int, step: int = 1) -> range:
    """Return the range of bits that contains the k-th largest number; for a sample, very likely.

    Missing numbers, if there are fewer than k, count as zeros, in bucket 0. A k of 0, the share of
    no numbers, counts as 1.

    Args:
        counts: A histogram.
        k: Rank of the number, from 1.
        step: Stride of the sample, over numbers or rows.
    """
    above = counts[::-1].cumsum()
    size, k = float(above[-1]), max(k, 1)
    # Eight standard deviations of the rank in a sample, and one bucket for differences of rows.
    margin = 8 * math.sqrt((step - 1) * k * max(0.0, 1 - k / size)) if size else 0.0
    slack = 1 if step > 1 else 0
    places = np.searchsorted(above, [max(1.0, k - margin), k + margin])
    highest, lowest = np.maximum(BUCKETS - 1 - places, 0).tolist()
    return range(max(0, lowest - slack) << _LOWER, min(BUCKETS, highest + slack + 1) << _LOWER)


class Tally:
    """Counts the magnitudes above a range of bits, and each magnitude inside the range.

    Tallies of parts can be merged to that of the whole.

    Args:
        between: The range of bits.
    """

    def __init__(self, between: range) -> None:
        self._between = between
        self._above = 0
        self._counts = [(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64))]
        """Arrays of bits inside the range with their counts: a sorted, unique one first, then the
        newly added ones."""
        self._added = 0

    def add(self, values: Tensor) -> None:
        """Count numbers: float32, any shape, no NaN."""
        bits = _magnitudes(values)
        # Zeros need not be counted: missing numbers are zeros.
        inside = bits >= np.int32(max(1, self._between.start))
        above = bits >= np.int32(self._between.stop)
        inside ^= above
        self._above += int(np.count_nonzero(above))
        self._gather(*np.unique(bits[np.flatnonzero(inside)], return_counts=True))

    def merge(self, other: Tally) -> None:
        """Add the counts of another tally of the same range."""
        self._above += other._above
        for bits, counts in other._counts:
            self._gather(bits, counts)

    def kth_largest(self, k: int) -> float | None:
        """Return the k-th largest magnitude, k from 1; None if it is outside of the range.

        Missing numbers, if there are fewer than k, are zeros. A k of 0 counts as 1.
        """
        left = max(k, 1) - self._above
        if left <= 0:
            return None
        self._compact()
        [(bits, counts)] = self._counts
        place = int(np.searchsorted(counts[::-1].cumsum(), left))
        if place == len(bits):
            return 0.0 if self._between.start == 0 else None
        return _number(bits[len(bits) - 1 - place])

    def _gather(self, bits: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]) -> None:
        self._counts.append((bits, counts))
        self._added += len(bits)
        if self._added > max(_MOST_ADDED, len(self._counts[0][0])):
            self._compact()

    def _compact(self) -> None:
        bits, counts = map(np.concatenate, zip(*self._counts, strict=True))
        once, place = np.unique(bits, return_inverse=True)
        # bincount sums weights in float64, which is exact below 2⁵³.
        sums = np.bincount(place, weights=counts, minlength=len(once)).astype(np.int64)
        self._counts, self._added = [(once, sums)], 0


def kth_largest(parts: Callable[[int], Iterable[Tensor]], count: int, k: int) -> float:
    """Return the k-th largest magnitude of numbers that are given in parts.

    Args:
        parts: Function of a stride that returns the numbers, or rows of them, with at most this
            stride; all of them for 1: float32, any shape, no NaN.
        count: Number of all numbers.
        k: Rank of the number, from 1. For more than ``count``, 0 is returned.

    Example:
        >>> import torch
        >>> values = torch.tensor([3.0, -5.0, 1.0])
        >>> kth_largest(lambda step: [values[::step]], 3, 2)
        3.0
    """
    k = max(k, 1)
    if count <= _FEW:
        bits = np.concatenate([np.zeros(0, dtype=np.int32), *map(_magnitudes, parts(1))])
        return _number(np.partition(bits, -k)[-k]) if k <= len(bits) else 0.0
    found = None
    for step in (SAMPLE, 1):
        tally = Tally(bracket(histogram(parts(step), count), k, step))
        for part in parts(1):
            tally.add(part)
        found = tally.kth_largest(k)
        if found is not None:
            break
    assert found is not None, "a histogram of all numbers brackets exactly"
    return found


def share_of(count: int, percent: float) -> int:
    """Return ⌈percent % of count⌉, exact in the decimal digits of the percentage."""
    return math.ceil(Fraction(str(percent)) * count / 100)


def _magnitudes(values: Tensor) -> npt.NDArray[np.int32]:
    """Return the bits of |x|."""
    magnitudes: npt.NDArray[np.float32] = np.abs(values.reshape(-1).numpy())
    return magnitudes.view(np.int32)


def _number(bits: np.int32) -> float:
    return float(bits.view(np.float32))
