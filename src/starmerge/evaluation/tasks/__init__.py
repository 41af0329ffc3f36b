"""The registry of tasks: one file per kind of data, every task a function that yields its rows.

No row is stored in the project. Each task makes its rows at run time from a small package of the
``demo`` extra, the same rows in every run.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from starmerge.errors import UsageError, nearest
from starmerge.evaluation.task import Task, load_path
from starmerge.evaluation.tasks.registry import TASKS

for _module in ("numbers", "places", "words"):
    importlib.import_module(f"{__name__}.{_module}")


def find_task(name: str) -> Task:
    """Return a task by its registered name, or read it from a JSONL file or a folder.

    Raises:
        UsageError: There is no such task and no such path.
    """
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if path.exists():
        return load_path(path)
    raise UsageError(
        f"No task is called {name!r}, and no such file or folder exists.{nearest(name, TASKS)}"
    )


__all__ = ["TASKS", "find_task"]
