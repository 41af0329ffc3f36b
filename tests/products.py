"""Products of options, of which a part shows as much as the whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def one_in(count: int, *axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return one in so many of all combinations, such that any two options still meet.

    A fault that shows by one option, or by two together, is found by them; one that takes three may
    not be. The combinations taken are those whose options' places add up to a multiple of
    ``count``, so all options occur about equally often.

    Raises:
        ValueError: Two options of different axes do not meet: ``count`` is too large.
    """
    places = [range(len(axis)) for axis in axes]
    taken = [place for place in product(*places) if sum(place) % count == 0]
    for first, second in combinations(range(len(axes)), 2):
        met = {(place[first], place[second]) for place in taken}
        if len(met) < len(axes[first]) * len(axes[second]):
            raise ValueError(f"one in {count} leaves out pairs of axes {first} and {second}")
    return [tuple(axis[n] for axis, n in zip(axes, place, strict=True)) for place in taken]
