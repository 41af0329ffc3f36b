"""A cache of results per delta, kept for the lifetime of the delta."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import TypeVar
from weakref import WeakKeyDictionary

from starmerge_models.deltas import Delta

_Delta = TypeVar("_Delta", bound=Delta)
_Found = TypeVar("_Found")


def memoised(find: Callable[[_Delta], _Found]) -> Callable[[_Delta], _Found]:
    """Cache the results of a function of a delta, each for the lifetime of the delta.

    The result must not reference the delta, otherwise neither is ever freed. The delta's tensors
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
