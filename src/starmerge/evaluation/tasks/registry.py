"""The decorator that puts a task into the registry."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from types import ModuleType

from starmerge.errors import UsageError
from starmerge.evaluation.task import Example, Task

TASKS: dict[str, Task] = {}
"""Every registered task by name."""

Rows = Callable[[random.Random], Iterator[Example]]


def task(
    name: str,
    *,
    instruction: str,
    source: str,
    labels: tuple[str, ...] | None = None,
    answer: str = r"\w+",
) -> Callable[[Rows], Rows]:
    """Register the decorated function as the rows of a task (see :class:`Task`)."""

    def register(rows: Rows) -> Rows:
        TASKS[name] = Task(name, instruction, rows, labels, source, answer)
        return rows

    return register


def package(name: str) -> ModuleType:
    """Import the package behind a task.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"This task is made of the package {name.partition('.')[0]!r}, which is not installed. "
            "Install starmerge with its extra 'demo'."
        ) from error
