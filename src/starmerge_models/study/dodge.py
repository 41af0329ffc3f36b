"""Dodging: a small horizontal offset for each curve, so that overlapping points stay visible."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

_STEP = 0.06
"""Offset between two curves, as a share of the smallest gap between two places."""

_SPREAD = 0.3
"""Largest total offset of all curves, as a share of the same gap."""

_ALONE = 0.03
"""Offset between two curves if there is only one place, as a share of its value."""


class Dodge:
    """Computes the position of each curve at each place of an axis.

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
        """Return the position of a curve, by its index from 0, at a place."""
        shift = self._step * (curve - self._middle)
        return place * math.exp(shift) if self._is_log else place + shift
