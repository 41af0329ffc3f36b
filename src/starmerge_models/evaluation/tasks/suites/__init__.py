"""Suites: a base, its published fine-tunes and their tasks, as YAML files in this folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field, ValidationError

from starmerge_models import plugins
from starmerge_models.errors import UsageError, explain, nearest
from starmerge_models.evaluation.tasks.sources import Data
from starmerge_models.reading import read_yaml
from starmerge_models.storage import is_file

FOLDER = Path(__file__).parent


class Suite(Data):
    """A published experiment: the base, the merged models and the tasks."""

    name: str = Field(min_length=1)
    description: str = ""
    base: str
    """Hub id."""
    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of the registry, such as "flan-t5/qqp"; task files in the suite's folder; or tasks of a
    Python file there, ``my_tasks.py:quiz``."""
    models: dict[str, str]
    """The fine-tune of each task, by the task's name: a Hub id, ``demo:digits``, or a path that
    begins with a dot and is relative to the suite's folder."""
    notes: str = ""
    published: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Published normalised averages, in percent, by experiment and by method."""


def load_suite(file: Path) -> Suite:
    """Read a suite from a YAML file; the file's name is the default of ``name``.

    Raises:
        UsageError: The file is missing or broken, lacks a key or has an unknown one.
    """
    content, *more = read_yaml(file)
    if more or not isinstance(content, dict):
        raise UsageError(f"{file} is not a suite: it holds keys such as base and models.")
    try:
        suite = Suite.model_validate({"name": file.stem, **content})
    except ValidationError as error:
        raise UsageError(f"{file}: {explain(error, Suite.model_fields)}") from error
    models = {
        task: str((file.parent / model).resolve()) if model.startswith(".") else model
        for task, model in suite.models.items()
    }
    tasks = tuple(
        str(file.parent / task)
        if is_file(file.parent / task)
        else plugins.absolute_reference(task, file.parent)
        for task in suite.tasks
    )
    return suite.model_copy(update={"models": models, "tasks": tasks})


@cache
def suites() -> dict[str, Suite]:
    """Return the suites included in the package, by name."""
    return {file.stem: load_suite(file) for file in sorted(FOLDER.glob("*.yaml"))}


def find_suite(name: str) -> Suite:
    """Find a suite by its name, or read it from a YAML file.

    Raises:
        UsageError: There is no such suite and no such file, or the file is broken.
    """
    if name in suites():
        return suites()[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return load_suite(path)
    raise UsageError(f"No suite is called {name!r}.{nearest(name, suites())}")


__all__ = ["Suite", "find_suite", "load_suite", "suites"]
