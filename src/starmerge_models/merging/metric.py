"""The metric of a merge: whether it fits methods, models and base, and what methods get of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.hashing import remembered_blake3_of
from starmerge_models.checkpoints.metric import Metric
from starmerge_models.checkpoints.models import FineTune, files_of
from starmerge_models.errors import UsageError
from starmerge_models.methods.method import METHODS
from starmerge_models.methods.pipeline import Pipeline
from starmerge_models.spectral.metric import Inputs
from starmerge_models.spectral.moment import Moment

_SHOWN = 3
"""Tensors that an error message names."""


def check_metric(
    metric: Metric,
    base: Base,
    pipeline: Pipeline,
    models: Sequence[FineTune],
    tensors: Sequence[str],
) -> None:
    """Compare a metric with the merge that it is given to.

    Reads nothing but the base's weights, at the end, to hash them; those only once a process.

    Args:
        metric: The metric.
        base: The base.
        pipeline: The chain.
        models: The models.
        tensors: Names of the tensors of whose inputs the chain asks for the moment.

    Raises:
        UsageError: No method of the chain uses a metric; it lacks the moments of a tensor or of a
            model's own task; it was made along a merge of other models; it is of another base.
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
    for task in wanted(pipeline, tasks):
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


def wanted(pipeline: Pipeline, tasks: Sequence[str]) -> Iterator[str | None]:
    """Yield whose moments a chain asks for: None for the text for all tasks, or a task's name."""
    if pipeline.uses_metric:
        yield None
    if pipeline.needs_moments:
        yield from tasks


def hashes_of(models: Sequence[FineTune]) -> dict[str, dict[str, str]]:
    """Return the BLAKE3 of the models' files, by model and file: of which merge a metric is."""
    return {
        model.name: {file.name: remembered_blake3_of(file) for file in files_of(model)}
        for model in models
    }


def unused_tasks(metric: Metric, pipeline: Pipeline, tasks: Sequence[str]) -> list[str]:
    """Return the tasks of a metric whose prompts a chain would use, if a model had their name."""
    return [t for t in metric.tasks if t not in tasks] if pipeline.needs_moments else []


def inputs_of(metric: Metric, tensor: str, tasks: Sequence[str]) -> Inputs:
    """Return what a metric knows of the inputs of a tensor, to be read when it is asked for."""

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
