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
    from starmerge.methods import (
        Ace,
        Average,
        Breadcrumbs,
        Cart,
        Covariance,
        Dare,
        Della,
        Denoise,
        Emr,
        IsoC,
        IsoCts,
        Karcher,
        Knots,
        Linear,
        MetaGpt,
        Method,
        ModelStock,
        NuSlerp,
        OwnResponse,
        Pipeline,
        Scale,
        Sce,
        Slerp,
        Star,
        Svc,
        TallMasks,
        TaskArithmetic,
        Ties,
        Trim,
        TsvM,
    )

__version__ = "0.1.0"

__all__ = [
    "Ace",
    "Average",
    "Breadcrumbs",
    "Cart",
    "Covariance",
    "Dare",
    "Della",
    "Delta",
    "Denoise",
    "Dense",
    "Emr",
    "IsoC",
    "IsoCts",
    "Karcher",
    "Knots",
    "Linear",
    "LowRank",
    "MergeResult",
    "MetaGpt",
    "Method",
    "ModelStock",
    "NuSlerp",
    "OwnResponse",
    "Pipeline",
    "Scale",
    "Sce",
    "Slerp",
    "Star",
    "StarmergeError",
    "Svc",
    "TallMasks",
    "TaskArithmetic",
    "Ties",
    "Trim",
    "TsvM",
    "UsageError",
    "merge",
    "merge_state",
]

_HOMES = {
    "Delta": "deltas",
    "Dense": "deltas",
    "LowRank": "deltas",
    "MergeResult": "merging.engine",
    "StarmergeError": "errors",
    "UsageError": "errors",
    "merge": "merging.engine",
    "merge_state": "merging.engine",
}
"""Where the names live that are not methods."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "methods")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
