"""The report of a merge, ``merge_report.json``, with its inputs and a record of each tensor."""

from __future__ import annotations

import html
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from starmerge_models.checkpoints.card import CARD
from starmerge_models.checkpoints.hashing import blake3_of, blake3_of_contents
from starmerge_models.merging.layout import PlannedTensor
from starmerge_models.merging.outputs import Finished
from starmerge_models.merging.plan import Plan
from starmerge_models.methods.pipeline import Merged
from starmerge_models.recipe import Recipe
from starmerge_models.storage import OutputFolder
from starmerge_models.storage.publishing import REPORT
from starmerge_models.versions import installed_versions

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 2
"""Version of the report's schema, incremented for changes that break readers."""

_PACKAGES = ("torch", "numpy")


@dataclass(frozen=True, repr=False)
class MergeReport:
    """The record of a merge: ``merge_report.json``. A notebook shows its summary."""

    content: dict[str, Any]

    @property
    def tensors(self) -> list[dict[str, Any]]:
        """A record for each merged tensor, with a record for each model in ``tasks``."""
        records: list[dict[str, Any]] = self.content["tensors"]
        return records

    @property
    def mean_rank(self) -> float | None:
        """Mean kept rank over all tensors and tasks, without zero deltas.

        None for methods that do not truncate.
        """
        tasks = [task for record in self.tensors for task in record["tasks"]]
        ranks = [task["rank"] for task in tasks if task["nuclear_before"]]
        return sum(ranks) / len(ranks) if ranks else None

    def __repr__(self) -> str:
        """Return the method and the summary."""
        return f"MergeReport of {self.content['recipe']['method']}: {self.summary()}"

    def _repr_html_(self) -> str:
        """Return the method and the summary for a notebook."""
        method = html.escape(self.content["recipe"]["method"])
        return f"<p><b>{method}</b>: {html.escape(self.summary())}</p>"

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each merged tensor and, where the method truncates, each model.

        Its columns are those of the tensors' records (``name``, ``shape``, ``dtype`` and what the
        output says of the tensor) and of the models' (``model``, ``rank``, ``nuclear_before``, …).

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas as pd  # noqa: PLC0415

        rows = []
        for record in self.tensors:
            own = {key: value for key, value in record.items() if key != "tasks"}
            rows += [own | task for task in record["tasks"] or [{}]]
        return pd.DataFrame(rows)

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
    """Return the versions of the packages that compute a merge, including plug-ins."""
    packages = installed_versions(_PACKAGES)
    own = {
        plugin["package"]: plugin["version"]
        for plugin in recipe.plugins.values()
        if "package" in plugin
    }
    return packages | {"python": platform.python_version()} | own


def tensor_record(
    plan: Plan, tensor: PlannedTensor, stored: Mapping[str, Any], merged: Merged
) -> dict[str, Any]:
    """Return the record of one merged tensor.

    Args:
        plan: The plan.
        tensor: The tensor.
        stored: The output's entries for the tensor.
        merged: The result of the chain.
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


def hashes_beside(folder: OutputFolder, report: Mapping[str, Any]) -> dict[str, str]:
    """Return the BLAKE3 of an output's files without tensors, such as the config.

    The model card is left out, because users edit it before they publish a model.

    Args:
        folder: The output.
        report: Its report, with the names of its files.
    """
    apart = {*report["digests"], REPORT, CARD}
    return {name: blake3_of(folder.place(name)) for name in report["files"] if name not in apart}


def hashes_of_contents(finished: Finished) -> dict[str, str]:
    """Return the hash of the tensors in each file of an output; see :func:`blake3_of_contents`."""
    return {file: blake3_of_contents(tensors) for file, tensors in finished.digests.items()}


def make_report(
    plan: Plan,
    finished: Finished,
    findings: Mapping[str, Any],
    tensors: Sequence[dict[str, Any]],
    hashes: Sequence[Mapping[str, Any]],
    changing: Collection[int],
) -> MergeReport:
    """Assemble the report of a finished merge.

    Args:
        plan: The plan.
        finished: The result of the output.
        findings: The methods' surveys of the whole model.
        tensors: The records of the tensors.
        hashes: The hashes of each input of the plan, as plain data.
        changing: Numbers of the models with a nonzero delta.
    """
    metric = None
    if plan.metric is not None:
        metric = {
            "file": plan.metric.file.name,
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
            "notes": list(plan.notes),
            "findings": {**findings, **finished.findings},
            "output": {"kind": plan.output.kind, **finished.facts, "summary": finished.summary},
            "metric": metric,
            "unchanged": [
                plan.models[t].name
                for t in sorted({t for tensor in plan.tensors for t in tensor.models})
                if t not in changing
            ],
            "inputs": [
                {
                    "name": given.name,
                    "kind": given.kind,
                    "reference": str(given.source),
                    "hub_id": given.source.name,
                    "revision": given.source.revision,
                    **own,
                }
                for given, own in zip(plan.inputs, hashes, strict=True)
            ],
            "digests": {
                file: {tensor.name: digest for tensor, digest in tensors}
                for file, tensors in finished.digests.items()
            },
            "tensors_copied": len(plan.tensors) - len(plan.merged),
            "tensors": list(tensors),
        }
    )
