"""The report of a merge, ``merge_report.json``: what went in, what happened to each tensor."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

from starmerge.checkpoints.hashing import remembered_blake3_of
from starmerge.checkpoints.source import Source
from starmerge.merging.fold import Fold, Folded
from starmerge.merging.plan import Plan, PlannedTensor
from starmerge.methods.pipeline import Merged

_PACKAGES = ("starmerge", "torch", "numpy")
_LITTLE = 0.9
"""Share of the update; when less survives, that is said."""


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

    @property
    def survived(self) -> float:
        """Share of the merged update that survives the rounding, over all tensors."""
        energies = [record["update_norm"] ** 2 for record in self.tensors]
        kept = sum(r["survived"] * e for r, e in zip(self.tensors, energies, strict=True))
        return float(kept / sum(energies)) if any(energies) else 1.0

    def summary(self) -> str:
        """Return the report in a sentence."""
        copied = self.content["tensors_copied"]
        text = f"{len(self.tensors)} tensors merged, {copied} left as they are"
        metric = self.content["metric"]
        if metric is not None:
            text += f"; merged in {metric['use']} ({metric['file']})"
        if self.mean_rank is not None:
            text += f"; mean rank kept {self.mean_rank:.1f}"
        if any(record["update_norm"] for record in self.tensors):
            text += f"; {self.survived:.1%} of the update survives the rounding of the output"
            if self.survived < _LITTLE:
                text += " (with dtype float32 all of it would)"
        else:
            text += "; the update is zero"
        if self.content["reason"] is not None:
            text += f". {self.content['reason'].removesuffix('.')}"
        if metric is not None and metric["unused_prompts"]:
            unused = ", ".join(metric["unused_prompts"])
            text += f". The metric's prompts of {unused} are of no model that is merged"
        for name in self.content["unchanged"]:
            text += f". {name} changes nothing: all its deltas are zero, and it counts as a model"
        return text + "."


def tensor_record(
    plan: Plan, tensor: PlannedTensor, merged: Merged, folded: Fold | Folded
) -> dict[str, Any]:
    """Return what the report says of one merged tensor."""
    tasks = [
        {"model": plan.models[task].name, **asdict(truncation)}
        for task, truncation in sorted(merged.truncations.items())
    ]
    return {
        "name": tensor.source.name,
        "shape": list(tensor.source.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "update_norm": folded.update_norm,
        "survived": folded.survived,
        "tasks": tasks,
    }


class InputHashes:
    """BLAKE3 of every input file, computed by a thread of its own while the merge runs.

    To be used as a context manager.
    """

    def __init__(self, plan: Plan) -> None:
        self._files = _input_files(plan)
        self._pool = ThreadPoolExecutor(1, "hashes")
        self._stopped = Event()

    def __enter__(self) -> InputHashes:
        self._hashes = {
            key: {
                file.name: self._pool.submit(remembered_blake3_of, file, self._stopped)
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
        """Wait for the hashes: by model (the base is "base") and file name."""
        return {
            key: {name: future.result() for name, future in files.items()}
            for key, files in self._hashes.items()
        }


def make_report(
    plan: Plan,
    findings: Mapping[str, Any],
    tensors: Sequence[dict[str, Any]],
    hashes: Mapping[str, Mapping[str, str]],
    changing: Collection[int],
) -> MergeReport:
    """Put the report of a finished merge together.

    Args:
        plan: The plan.
        findings: What the methods found in the whole model.
        tensors: The records of the tensors.
        hashes: Of the inputs.
        changing: Numbers of the models of which some delta is not zero.
    """
    sources = [("base", "base", plan.base.source)]
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
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
            | {"python": platform.python_version()}
            | {
                plugin["package"]: plugin["version"]
                for plugin in plan.recipe.plugins.values()
                if "package" in plugin
            },
            "recipe": plan.recipe.model_dump(),
            "reason": plan.reason,
            "findings": dict(findings),
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
            "tensors_copied": len(plan.tensors) - len(plan.merged),
            "tensors": list(tensors),
        }
    )


def _input_files(plan: Plan) -> dict[str, list[Path]]:
    files = {"base": plan.base.checkpoint.files}
    files |= {f"model {model.name}": model.files for model in plan.models}
    return files if plan.metric is None else files | {"metric": [plan.metric.file]}
