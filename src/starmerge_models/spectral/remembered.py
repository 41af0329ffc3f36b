"""What is costly to find of a delta, and kept as long as the delta itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import TypeVar
from weakref import WeakKeyDictionary

from starmerge_models.deltas import Delta

_Delta = TypeVar("_Delta", bound=Delta)
_Found = TypeVar("_Found")


def remembered(find: Callable[[_Delta], _Found]) -> Callable[[_Delta], _Found]:
    """Make a function of a delta remember its results, each as long as its delta lives.

    What ``find`` returns must not hold the delta, or neither is ever let go of. The delta's tensors
    must not be changed after the first call.
    """
    known: WeakKeyDictionary[_Delta, _Found] = WeakKeyDictionary()
    lock = Lock()

    @wraps(find)
    def look_up(delta: _Delta) -> _Found:
        with lock:
            if delta in known:
                return known[delta]
        found = find(delta)
        with lock:
            return known.setdefault(delta, found)

    return look_up
