"""The metric of a merge: its checks against methods, models and base, and access to its moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.hashing import cached_blake3_of
from starmerge_models.checkpoints.metric import Metric
from starmerge_models.checkpoints.models import FineTune, files_of
from starmerge_models.errors import UsageError
from starmerge_models.methods.method import METHODS
from starmerge_models.methods.pipeline import Pipeline
from starmerge_models.spectral.metric import Inputs
from starmerge_models.spectral.moment import Moment

_SHOWN = 3
"""Number of tensors that an error message names."""


def check_metric(
    metric: Metric,
    base: Base,
    pipeline: Pipeline,
    models: Sequence[FineTune],
    tensors: Sequence[str],
) -> None:
    """Check a metric against the merge.

    The only data that is read are the base's weights, at the end, to hash them once per process.

    Args:
        metric: The metric.
        base: The base.
        pipeline: The chain.
        models: The models.
        tensors: Names of the tensors whose inputs' moments the chain uses.

    Raises:
        UsageError: No method of the chain uses a metric; the metric lacks the moments of a tensor
            or of a model's own task; it was computed along a merge of other models, or for another
            base.
        StarmergeError: A moment does not fit its tensor.
    """
    if not pipeline.metric_users:
        known = sorted(
            name for name, found in METHODS.items() if found.uses_metric or found.needs_moments
        )
        raise UsageError(
            f"{pipeline.name} has no use for a metric. Leave the metric out, or choose a chain "
            f"with one of the methods that use it: {', '.join(known)}."
        )
    tasks = [model.name for model in models]
    if pipeline.needs_moments:
        _check_tasks(metric, pipeline, tasks)
        _check_along(metric, models)
    for task in needed_moments(pipeline, tasks):
        lacking = [name for name in tensors if not metric.has(name, task)]
        if lacking:
            shown = ", ".join(lacking[:_SHOWN])
            more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
            of = "" if task is None else f" in the prompts of {task}"
            raise UsageError(
                f"{metric.file} has no moment of the inputs{of} of {shown}{more}, which the models "
                f"change. Make a metric whose text reaches these modules (starmerge calibrate "
                f"{base.source} -o FILE --texts …; embeddings never have a moment), or merge "
                "without a metric."
            )
    metric.check_base(base)


def needed_moments(pipeline: Pipeline, tasks: Sequence[str]) -> Iterator[str | None]:
    """Yield the moments that a chain uses: None for the shared moment, or the name of a task."""
    if pipeline.uses_metric:
        yield None
    if pipeline.needs_moments:
        yield from tasks


def hashes_of(models: Sequence[FineTune]) -> dict[str, dict[str, str]]:
    """Return the BLAKE3 of the models' files, by model and file, to identify a metric's merge."""
    return {
        model.name: {file.name: cached_blake3_of(file) for file in files_of(model)}
        for model in models
    }


def unused_tasks(metric: Metric, pipeline: Pipeline, tasks: Sequence[str]) -> list[str]:
    """Return the tasks of a metric whose prompts a chain could use but that name no model."""
    return [t for t in metric.tasks if t not in tasks] if pipeline.needs_moments else []


def inputs_of(metric: Metric, tensor: str, tasks: Sequence[str]) -> Inputs:
    """Return the lazily read moments of a tensor's inputs from a metric."""

    def read(task: int | None) -> Moment:
        return metric.moment(tensor, None if task is None else tasks[task])

    return Inputs(metric.side(tensor), read)


def _check_tasks(metric: Metric, pipeline: Pipeline, tasks: Sequence[str]) -> None:
    name = next(step.name for step in pipeline.all_steps if step.needs_moments)
    lacking = [task for task in tasks if task not in metric.tasks]
    if not lacking:
        return
    prompts = " ".join(f"--prompts {task}=FILE" for task in lacking[:_SHOWN])
    known = ", ".join(metric.tasks)
    has = f"has prompts of {known} alone" if known else "was made without prompts of tasks"
    raise UsageError(
        f"{name} needs the inputs of every model's own task, and {metric.file} {has}: there are "
        f"none for {', '.join(lacking)}. Name the models as the tasks are named (NAME=PATH), or "
        f"make a metric with prompts of all (starmerge calibrate BASE -o FILE {prompts} …)."
    )


def _check_along(metric: Metric, models: Sequence[FineTune]) -> None:
    if metric.along is None:
        return
    files = hashes_of(models)
    if files != metric.along:
        others = sorted(name for name in files if files[name] != metric.along.get(name))
        raise UsageError(
            f"{metric.file} was made along a merge of {', '.join(metric.along)}, and this merge is "
            f"of {', '.join(files)}{f', where {others[0]} is another model' if others else ''}. "
            "Give starmerge calibrate the models that you merge, or none."
        )
