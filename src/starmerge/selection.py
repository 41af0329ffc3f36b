"""Exact selection of the k-th largest magnitude among more numbers than fit into memory.

Non-negative floats order as their bits do, read as integers. So a histogram over the upper half
of the bits of |x| tells in which of 65,536 buckets the k-th largest lies, and one over the lower
half, of that bucket alone, which number it is: two passes, 512 KiB, no sorting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

import torch
from torch import Tensor

_HALF = 16
BUCKETS = 1 << _HALF
"""Length of a histogram."""


def histogram(values: Tensor, bucket: int | None = None) -> Tensor:
    """Count magnitudes by the upper half of their bits, or, in one bucket of it, by the lower.

    Args:
        values: float32, any shape, no NaN.
        bucket: Which bucket of the upper half; None for the upper half itself.

    Returns:
        (65536,) int64. Histograms of parts add up to that of the whole.
    """
    bits = values.abs().reshape(-1).view(torch.int32)
    if bucket is None:
        return torch.bincount(bits >> _HALF, minlength=BUCKETS)
    inside = bits[bits >> _HALF == bucket] & (BUCKETS - 1)
    return torch.bincount(inside, minlength=BUCKETS)


def locate(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bucket of the k-th largest, and which of that bucket it is.

    If there are fewer than k, those that are missing count as zeros, in bucket 0. A k of 0, as a
    share of no numbers has it, counts as 1.
    """
    above = counts.flip(0).cumsum(0)
    place = min(int(torch.searchsorted(above, max(k, 1))), BUCKETS - 1)
    return BUCKETS - 1 - place, k - (int(above[place - 1]) if place else 0)


def magnitude(upper: int, lower: int) -> float:
    """Return the magnitude of which two buckets are known."""
    bits = torch.tensor(upper << _HALF | lower, dtype=torch.int32)
    return float(bits.view(torch.float32))


def kth_largest(parts: Callable[[], Iterable[Tensor]], k: int) -> float:
    """Return the k-th largest magnitude of numbers that come in parts, gone through twice.

    Args:
        parts: Returns the parts: float32, any shape, no NaN.
        k: Which one, from 1. If there are fewer numbers, 0 is returned.

    Example:
        >>> kth_largest(lambda: [torch.tensor([3.0, -5.0]), torch.tensor([1.0])], 2)
        3.0
    """
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    for part in parts():
        counts += histogram(part)
    upper, left = locate(counts, k)
    counts.zero_()
    for part in parts():
        counts += histogram(part, upper)
    return magnitude(upper, locate(counts, left)[0])


def share_of(count: int, percent: float) -> int:
    """Return ⌈percent % of count⌉, exactly: the percentage is taken as it is written."""
    return math.ceil(Fraction(str(percent)) * count / 100)
