"""Prompts from an installed package, in place of a task's own wording.

A fine-tune answers best to the wording that it was trained on. The prompts of some published
fine-tunes are copyrighted by others, so they are read from the package that contains them, on
request.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TypeVar, cast

from pydantic import ValidationError

from starmerge_models.errors import StarmergeError, UsageError, explain, nearest
from starmerge_models.evaluation.tasks.task import Task

AnyKind = TypeVar("AnyKind")


@dataclass(frozen=True)
class Template:
    """The prompt that a fine-tune was trained with."""

    prompt: str
    """The prompt, with a row's fields in braces, as in a task."""
    answers: Mapping[str, str] | None
    """The answer for each value of the label; None where the answers are numbers."""


def with_prompts_of(package: str, tasks: Sequence[AnyKind]) -> tuple[list[AnyKind], str]:
    """Replace the prompts of tasks by those of a package, where it has one for the task's name.

    Args:
        package: A name of :data:`PACKAGES`.
        tasks: The tasks. Tasks of images and of lm-evaluation-harness are unchanged.

    Returns:
        The tasks, and a sentence that names the tasks with replaced prompts.

    Raises:
        UsageError: The package is unknown or not installed, has no prompt for any of the tasks, or
            its prompt has other answers than the task.
        StarmergeError: The package's file of prompts is missing or has another format.
    """
    if package not in PACKAGES:
        raise UsageError(
            f"--prompts {package}: no such package is known.{nearest(package, PACKAGES)}"
        )
    templates = PACKAGES[package]()
    found = [
        cast(AnyKind, _reworded(task, templates[task.name], package))
        if isinstance(task, Task) and task.name in templates
        else task
        for task in tasks
    ]
    others = [_name(task) for task, own in zip(found, tasks, strict=True) if task is not own]
    if not others:
        raise UsageError(
            f"--prompts {package}: it has prompts for {', '.join(templates)}, and none of these "
            "is selected. Leave the option out."
        )
    own = [_name(task) for task, before in zip(found, tasks, strict=True) if task is before]
    version = importlib.metadata.version(package)
    note = f"Prompts: {', '.join(others)} in the words of {package} {version}"
    return found, f"{note}; {', '.join(own)} in the task's own." if own else f"{note}."


def _reworded(task: Task, template: Template, package: str) -> Task:
    changed: dict[str, object] = {"prompt": template.prompt}
    if template.answers is not None:
        words = task.labels or {}
        for value, answer in template.answers.items():
            if answer not in words.get(value, ()):
                raise UsageError(
                    f"--prompts {package}: its prompt for {task.name} asks for the answers "
                    f"{', '.join(template.answers.values())}, and the task reads "
                    f"{', '.join(word for own in words.values() for word in own) or 'others'}. Its "
                    "fine-tunes are others: leave the option or the task out."
                )
        changed["labels"] = {
            value: (answer, *(word for word in words[value] if word != answer))
            for value, answer in template.answers.items()
        }
    content = {key: getattr(task, key) for key in task.model_fields_set}
    try:
        return Task.model_validate({**content, **changed})
    except ValidationError as error:
        raise UsageError(
            f"--prompts {package}: its prompt does not fit the task {task.name}: "
            f"{explain(error, Task.model_fields)}"
        ) from error


def _name(task: object) -> str:
    return str(getattr(task, "name", task))


def _fusion_bench() -> dict[str, Template]:
    """Return the prompts that the ``tanganke/flan-t5-*_glue-*`` adapters were trained on.

    Source: github.com/tanganke/fusion_bench. Only the file with the prompts is loaded, since
    importing the package needs many dependencies.
    """
    package = find_spec("fusion_bench")  # finds the package without importing it
    if package is None or not package.submodule_search_locations:
        raise UsageError(
            "--prompts fusion-bench: the package is not installed. Install it with 'pip install "
            "--no-deps fusion-bench': nothing that it depends on is needed."
        )
    folder = Path(next(iter(package.submodule_search_locations)))
    file = folder / "tasks" / "flan_t5_text_generation" / "glue_prompt_templates.py"
    spec = spec_from_file_location("fusion_bench_glue_prompt_templates", file)
    if spec is None or spec.loader is None:  # a file that does not end in .py
        raise AssertionError(file)
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return {
            name: Template(
                template["input_text"],
                template["target_text"] if isinstance(template["target_text"], dict) else None,
            )
            for name, template in module.glue_prompt_templates.items()
        }
    except Exception as error:  # another package's code may raise anything
        raise StarmergeError(
            f"{file} holds no prompts that can be read ({type(error).__name__}: {error}). "
            "fusion-bench 0.2.33 has them there: pip install --no-deps fusion-bench==0.2.33"
        ) from error


PACKAGES: dict[str, Callable[[], dict[str, Template]]] = {"fusion-bench": _fusion_bench}
"""By distribution name: reads a package's prompts, by task name."""
