"""Task files: reads YAML into a task; errors name the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from starmerge_models import plugins
from starmerge_models.errors import UsageError, explain, nearest
from starmerge_models.evaluation.tasks.images import IMAGE_SOURCES, ImageTask
from starmerge_models.evaluation.tasks.sources import (
    Data,
    FileSource,
    GeneratorSource,
    HubSource,
    Sample,
)
from starmerge_models.evaluation.tasks.task import Gold, Task
from starmerge_models.reading import read_yaml

DataTask = Task | ImageTask
"""The kinds of task that a task file describes."""

_KINDS: dict[str, tuple[type[Task] | type[ImageTask], Mapping[str, type[Data]]]] = {
    "text": (Task, {"hub": HubSource, "file": FileSource, "generator": GeneratorSource}),
    "image-classification": (ImageTask, IMAGE_SOURCES),
}
"""By a file's ``kind``: the task's class, and its source classes by their distinguishing key."""


def load_task(file: Path) -> DataTask:
    """Read a task from a YAML file; the file's name is the default of ``name``.

    Raises:
        UsageError: The file is missing or not YAML, lacks a key, has an unknown one or a value
            that does not fit.
    """
    content, *more = read_yaml(file)
    if more:
        raise UsageError(f"{file} holds {1 + len(more)} documents. Put each into its own file.")
    if not isinstance(content, dict):
        raise UsageError(f"{file} is not a task: a task file holds keys such as prompt and source.")
    return make_task({"name": file.stem, **content}, where=str(file), folder=file.parent)


def make_task(content: Mapping[str, Any], *, where: str, folder: Path = Path()) -> DataTask:
    """Make a task from the content of its file.

    Args:
        content: The keys and values; ``kind`` is "text" or "image-classification", by default the
            former.
        where: Name of the task in error messages.
        folder: Folder that relative paths are resolved against, also those of Python files
            with a matcher, a metric or a generator, which are executed.

    Raises:
        UsageError: A key is missing or unknown, or a value does not fit.
    """
    kind = str(content.get("kind", "text"))
    if kind not in _KINDS:
        raise UsageError(f"{where}: the kind {kind!r} is unknown.{nearest(kind, _KINDS)}")
    model, sources = _KINDS[kind]
    named = {
        key: plugins.absolute_reference(content[key], folder.absolute())
        for key in ("match", "metric")
        if isinstance(content.get(key), str)
    }
    try:
        task = model.model_validate(_with_one_source({**content, **named}, sources, where))
    except ValidationError as error:
        known = {key for part in (model, Sample, Gold) for key in part.model_fields}
        raise UsageError(f"{where}: {explain(error, known)}") from error
    return task.beside(folder)


def _with_one_source(
    content: Mapping[str, Any], sources: Mapping[str, type[Data]], where: str
) -> dict[str, Any]:
    """Validate the source as the kind that its keys name, so that errors concern that kind only."""
    source = content.get("source")
    if source is not None and not isinstance(source, Mapping):
        raise UsageError(f"{where}: source holds keys, such as file: rows.jsonl.")
    if source is None:
        return dict(content)
    kinds = [kind for kind in sources if kind in source]
    if len(kinds) != 1:
        known = ", ".join(sources)
        raise UsageError(f"{where}: source needs one of the keys {known}.")
    chosen = sources[kinds[0]]
    try:
        return {**content, "source": chosen.model_validate(source)}
    except ValidationError as error:
        raise UsageError(f"{where}: source: {explain(error, chosen.model_fields)}") from error


def as_yaml(task: DataTask) -> str:
    """Return a task as the YAML text of a task file."""
    content = task.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
