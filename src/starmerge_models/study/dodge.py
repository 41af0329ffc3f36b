"""Curves that share places on an axis, drawn a little beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

_STEP = 0.06
"""Between two curves, as a share of the smallest gap between two places."""

_SPREAD = 0.3
"""Of all curves at most, as a share of the same."""

_ALONE = 0.03
"""Between two curves where there is one place, as a share of it."""


class Dodge:
    """Says where each curve stands at each place of an axis.

    Args:
        places: Positions on the axis that the curves share.
        curves: How many curves there are.
        is_log: Whether the axis is logarithmic.
    """

    def __init__(self, places: Iterable[float], curves: int, *, is_log: bool = False) -> None:
        self._is_log = is_log
        self._middle = (curves - 1) / 2
        scaled = sorted({math.log(place) if is_log else float(place) for place in places})
        gap = min((b - a for a, b in pairwise(scaled)), default=_ALONE * (abs(scaled[0]) or 1.0))
        self._step = gap * min(_STEP, _SPREAD / max(1, curves - 1))

    def __call__(self, place: float, curve: int) -> float:
        """Return the position of a curve, by its number from 0, for a place."""
        shift = self._step * (curve - self._middle)
        return place * math.exp(shift) if self._is_log else place + shift
