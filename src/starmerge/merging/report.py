"""The report of a merge, ``merge_report.json``: what went in, what happened to each tensor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

from starmerge.checkpoints.card import CARD
from starmerge.checkpoints.hashing import blake3_of, remembered_blake3_of
from starmerge.checkpoints.output import REPORT
from starmerge.checkpoints.source import Source
from starmerge.merging.layout import PlannedTensor
from starmerge.merging.outputs import Finished
from starmerge.merging.plan import Plan
from starmerge.methods.pipeline import Merged
from starmerge.recipe import Recipe

SCHEMA = 1
"""Of the report: raised when a reader of an earlier one would misread it."""

_PACKAGES = ("starmerge", "torch", "numpy")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; the content of ``merge_report.json``."""

    content: dict[str, Any]

    @property
    def tensors(self) -> list[dict[str, Any]]:
        """A record for each merged tensor; ``tasks`` holds a record for each model."""
        records: list[dict[str, Any]] = self.content["tensors"]
        return records

    @property
    def mean_rank(self) -> float | None:
        """Mean rank kept over all tensors and tasks; None for methods that keep everything.

        Zero deltas do not count.
        """
        tasks = [task for record in self.tensors for task in record["tasks"]]
        ranks = [task["rank"] for task in tasks if task["nuclear_before"]]
        return sum(ranks) / len(ranks) if ranks else None

    def summary(self) -> str:
        """Return the report in a sentence."""
        copied = self.content["tensors_copied"]
        left = f", {copied} left as they are" if copied else ""
        text = f"{len(self.tensors)} tensors merged{left}"
        metric = self.content["metric"]
        if metric is not None:
            text += f"; merged in {metric['use']} ({metric['file']})"
        if self.mean_rank is not None:
            text += f"; mean rank kept {self.mean_rank:.1f}"
        text += f"; {self.content['output']['summary']}"
        if self.content["reason"] is not None:
            text += f". {self.content['reason'].removesuffix('.')}"
        if metric is not None and metric["unused_prompts"]:
            unused = ", ".join(metric["unused_prompts"])
            text += f". The metric's prompts of {unused} are of no model that is merged"
        for name in self.content["unchanged"]:
            text += f". {name} changes nothing: all its deltas are zero, and it counts as a model"
        return text + "."


def versions(recipe: Recipe) -> dict[str, str]:
    """Return the versions of what computes a merge, plug-ins of packages among it."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    own = {
        plugin["package"]: plugin["version"]
        for plugin in recipe.plugins.values()
        if "package" in plugin
    }
    return packages | {"python": platform.python_version()} | own


def tensor_record(
    plan: Plan, tensor: PlannedTensor, stored: Mapping[str, Any], merged: Merged
) -> dict[str, Any]:
    """Return what the report says of one merged tensor.

    Args:
        plan: The plan.
        tensor: The tensor.
        stored: What the output says of it.
        merged: What the chain made of it.
    """
    tasks = [
        {"model": plan.models[task].name, **asdict(truncation)}
        for task, truncation in sorted(merged.truncations.items())
    ]
    return {
        "name": tensor.source.name,
        "shape": list(tensor.source.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        **stored,
        "tasks": tasks,
    }


class InputHashes:
    """BLAKE3 of every input file, computed by a thread of its own while the merge runs.

    To be used as a context manager.
    """

    def __init__(self, plan: Plan) -> None:
        self._files, self._roots = plan.files, plan.roots
        self._pool = ThreadPoolExecutor(1, "hashes")
        self._stopped = Event()

    def __enter__(self) -> InputHashes:
        self._hashes = {
            key: {
                os.path.relpath(file, self._roots[key]): self._pool.submit(
                    remembered_blake3_of, file, self._stopped
                )
                for file in files
            }
            for key, files in self._files.items()
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def result(self) -> Mapping[str, Mapping[str, str]]:
        """Wait for the hashes: by model (the base is "base") and file, relative to its folder."""
        return {
            key: {name: future.result() for name, future in files.items()}
            for key, files in self._hashes.items()
        }


def hashes_beside(folder: Path, report: Mapping[str, Any]) -> dict[str, str]:
    """Return the BLAKE3 of the files of an output that hold no tensors, such as its config.

    The card is left out: whoever publishes a model edits it.

    Args:
        folder: The output.
        report: Its report, with the names of its files.
    """
    apart = {*report["digests"], REPORT, CARD}
    return {name: blake3_of(folder / name) for name in report["files"] if name not in apart}


def make_report(
    plan: Plan,
    finished: Finished,
    findings: Mapping[str, Any],
    tensors: Sequence[dict[str, Any]],
    hashes: Mapping[str, Mapping[str, str]],
    changing: Collection[int],
) -> MergeReport:
    """Put the report of a finished merge together.

    Args:
        plan: The plan.
        finished: What the output says of itself.
        findings: What the methods found in the whole model.
        tensors: The records of the tensors.
        hashes: Of the inputs.
        changing: Numbers of the models of which some delta is not zero.
    """
    sources = [("base", "base", plan.base.source)] if plan.base.has_weights else []
    sources += [(model.name, model.kind, model.source) for model in plan.models]
    metric = None
    if plan.metric is not None:
        file = plan.metric.file
        sources.append((file.name, "metric", Source(str(file), file, None, None)))
        metric = {
            "file": file.name,
            "use": plan.use_of_metric,
            "made_from": dict(plan.metric.made_from),
            "unused_prompts": plan.unused_prompts,
        }
    return MergeReport(
        {
            "schema": SCHEMA,
            "versions": versions(plan.recipe),
            "recipe": plan.recipe.model_dump(),
            "reason": plan.reason,
            "findings": {**findings, **finished.findings},
            "output": {"kind": plan.output.kind, **finished.facts, "summary": finished.summary},
            "metric": metric,
            "unchanged": [model.name for t, model in enumerate(plan.models) if t not in changing],
            "inputs": [
                {
                    "name": name,
                    "kind": kind,
                    "reference": str(source),
                    "hub_id": source.name,
                    "revision": source.revision,
                    "blake3": dict(hashes[key]),
                }
                for key, (name, kind, source) in zip(hashes, sources, strict=True)
            ],
            "digests": {file: dict(own) for file, own in finished.digests.items()},
            "tensors_copied": len(plan.tensors) - len(plan.merged),
            "tensors": list(tensors),
        }
    )
