"""Merge fine-tuned models of one base into one multi-task model.

The public names are loaded when they are first used, so that ``import starmerge`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starmerge.deltas import Delta, Dense, LowRank
    from starmerge.errors import StarmergeError, UsageError
    from starmerge.merging.engine import MergeResult, merge, merge_state
    from starmerge.methods import Average, Method, Star, TaskArithmetic

__version__ = "0.1.0"

_HOMES = {
    "Average": "methods",
    "Delta": "deltas",
    "Dense": "deltas",
    "LowRank": "deltas",
    "MergeResult": "merging.engine",
    "Method": "methods",
    "Star": "methods",
    "StarmergeError": "errors",
    "TaskArithmetic": "methods",
    "UsageError": "errors",
    "merge": "merging.engine",
    "merge_state": "merging.engine",
}

__all__ = [
    "Average",
    "Delta",
    "Dense",
    "LowRank",
    "MergeResult",
    "Method",
    "Star",
    "StarmergeError",
    "TaskArithmetic",
    "UsageError",
    "merge",
    "merge_state",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
