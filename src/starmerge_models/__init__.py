"""Merge fine-tuned models of one base into one multi-task model.

``import starmerge_models as sm``. The public interface is ``sm.__all__``, the names of this module;
modules below it may change in any release. The names are imported when they are first used, so that
the import itself is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from starmerge_models.versions import __version__ as __version__

if TYPE_CHECKING:
    from starmerge_models.calibration.run import Calibrated as Calibrated
    from starmerge_models.calibration.run import calibrate as calibrate
    from starmerge_models.checkpoints.metric import Metric as Metric
    from starmerge_models.checkpoints.metric import open_metric as open_metric
    from starmerge_models.deltas import Delta as Delta
    from starmerge_models.deltas import Dense as Dense
    from starmerge_models.deltas import LowRank as LowRank
    from starmerge_models.errors import StarmergeError as StarmergeError
    from starmerge_models.errors import UsageError as UsageError
    from starmerge_models.evaluation.cache import ScoreCache as ScoreCache
    from starmerge_models.evaluation.evaluation import Evaluation as Evaluation
    from starmerge_models.evaluation.results import Results as Results
    from starmerge_models.evaluation.results import load_results as load_results
    from starmerge_models.evaluation.runner import evaluate as evaluate
    from starmerge_models.evaluation.settings import Settings as Settings
    from starmerge_models.hub.push import Pushed as Pushed
    from starmerge_models.hub.push import push as push
    from starmerge_models.mergekit.method import Mergekit as Mergekit
    from starmerge_models.merging.apply import Applied as Applied
    from starmerge_models.merging.apply import apply as apply
    from starmerge_models.merging.engine import MergeResult as MergeResult
    from starmerge_models.merging.engine import merge as merge
    from starmerge_models.merging.in_memory import merge_state as merge_state
    from starmerge_models.merging.loaded_adapters import MergedAdapter as MergedAdapter
    from starmerge_models.merging.loaded_adapters import merge_adapters as merge_adapters
    from starmerge_models.merging.task_vectors import TaskVectors as TaskVectors
    from starmerge_models.merging.task_vectors import load_task_vectors as load_task_vectors
    from starmerge_models.merging.verify import Verdict as Verdict
    from starmerge_models.merging.verify import verify as verify
    from starmerge_models.methods import Method as Method
    from starmerge_models.methods import Pipeline as Pipeline
    from starmerge_models.methods.built_in import *
    from starmerge_models.study.choose import Choice as Choice
    from starmerge_models.study.choose import choose as choose
    from starmerge_models.study.inspection.inspection import Inspection as Inspection
    from starmerge_models.study.inspection.run import inspect as inspect

_HOMES = {
    "Applied": "merging.apply",
    "Calibrated": "calibration.run",
    "Choice": "study.choose",
    "Delta": "deltas",
    "Dense": "deltas",
    "Evaluation": "evaluation.evaluation",
    "Inspection": "study.inspection.inspection",
    "LowRank": "deltas",
    "MergeResult": "merging.engine",
    "MergedAdapter": "merging.loaded_adapters",
    "Mergekit": "mergekit.method",
    "Method": "methods",
    "Metric": "checkpoints.metric",
    "Pipeline": "methods",
    "Pushed": "hub.push",
    "Results": "evaluation.results",
    "ScoreCache": "evaluation.cache",
    "Settings": "evaluation.settings",
    "StarmergeError": "errors",
    "TaskVectors": "merging.task_vectors",
    "UsageError": "errors",
    "Verdict": "merging.verify",
    "apply": "merging.apply",
    "calibrate": "calibration.run",
    "choose": "study.choose",
    "evaluate": "evaluation.runner",
    "inspect": "study.inspection.run",
    "load_results": "evaluation.results",
    "load_task_vectors": "merging.task_vectors",
    "merge": "merging.engine",
    "merge_adapters": "merging.loaded_adapters",
    "merge_state": "merging.in_memory",
    "open_metric": "checkpoints.metric",
    "push": "hub.push",
    "verify": "merging.verify",
}
"""Where the names live that are not in ``methods.built_in``."""


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    # The classes of methods are the other public names, and all begin with a capital: so that
    # asking for a submodule or a __special__ name does not load them.
    home = _HOMES.get(name, "methods.built_in" if name[:1].isupper() else None)
    if home is not None:
        found = getattr(importlib.import_module(f"{__name__}.{home}"), name, None)
        if found is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    built_in = importlib.import_module(f"{__name__}.methods.built_in")
    return sorted([*_HOMES, *(name for name in vars(built_in) if name[:1].isupper())])
