"""Merge fine-tuned models of one base into one multi-task model.

The public names are loaded when they are first used, so that ``import starmerge`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starmerge.calibration.run import Calibrated, calibrate
    from starmerge.checkpoints.metric import Metric, open_metric
    from starmerge.deltas import Delta, Dense, LowRank
    from starmerge.errors import StarmergeError, UsageError
    from starmerge.merging.apply import Applied, apply
    from starmerge.merging.engine import MergeResult, merge
    from starmerge.merging.in_memory import merge_state
    from starmerge.merging.task_vectors import TaskVectors, load_task_vectors
    from starmerge.methods import (
        Ace,
        Auto,
        Average,
        Breadcrumbs,
        Cart,
        Covariance,
        Ctm,
        Dare,
        DcMerge,
        Della,
        Denoise,
        Emr,
        IsoC,
        IsoCts,
        Karcher,
        Knots,
        Linear,
        Lines,
        MeanNorm,
        MetaGpt,
        Method,
        ModelStock,
        NuSlerp,
        OwnResponse,
        Pico,
        Pipeline,
        RegMean,
        Scale,
        Sce,
        Shares,
        Slerp,
        Star,
        SubspaceBoosting,
        Svc,
        TallMasks,
        TaskArithmetic,
        Ties,
        Trim,
        TsvM,
        Wudi,
    )
    from starmerge.study.choose import Choice, choose

__version__ = "0.1.0"

__all__ = [
    "Ace",
    "Applied",
    "Auto",
    "Average",
    "Breadcrumbs",
    "Calibrated",
    "Cart",
    "Choice",
    "Covariance",
    "Ctm",
    "Dare",
    "DcMerge",
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
    "Lines",
    "LowRank",
    "MeanNorm",
    "MergeResult",
    "MetaGpt",
    "Method",
    "Metric",
    "ModelStock",
    "NuSlerp",
    "OwnResponse",
    "Pico",
    "Pipeline",
    "RegMean",
    "Scale",
    "Sce",
    "Shares",
    "Slerp",
    "Star",
    "StarmergeError",
    "SubspaceBoosting",
    "Svc",
    "TallMasks",
    "TaskArithmetic",
    "TaskVectors",
    "Ties",
    "Trim",
    "TsvM",
    "UsageError",
    "Wudi",
    "apply",
    "calibrate",
    "choose",
    "load_task_vectors",
    "merge",
    "merge_state",
    "open_metric",
]

_HOMES = {
    "Applied": "merging.apply",
    "Calibrated": "calibration.run",
    "Choice": "study.choose",
    "Delta": "deltas",
    "Dense": "deltas",
    "LowRank": "deltas",
    "MergeResult": "merging.engine",
    "Metric": "checkpoints.metric",
    "StarmergeError": "errors",
    "TaskVectors": "merging.task_vectors",
    "UsageError": "errors",
    "apply": "merging.apply",
    "calibrate": "calibration.run",
    "choose": "study.choose",
    "load_task_vectors": "merging.task_vectors",
    "merge": "merging.engine",
    "merge_state": "merging.in_memory",
    "open_metric": "checkpoints.metric",
}
"""Where the names live that are not methods."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "methods")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
