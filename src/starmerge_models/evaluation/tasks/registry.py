"""The registry of tasks: YAML files in a folder for each suite; looks up tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from starmerge_models.errors import UsageError, nearest
from starmerge_models.evaluation.tasks.bare_rows import HELD_OUT, task_of_rows
from starmerge_models.evaluation.tasks.files import DataTask, load_task
from starmerge_models.evaluation.tasks.sources import FileSource, read_file
from starmerge_models.evaluation.tasks.task import Task
from starmerge_models.plugins import Registry, is_file_reference
from starmerge_models.storage import exists

FOLDER = Path(__file__).parent / "built_in"
"""The folder of the included tasks, with a sub-folder for each suite."""


def _built_in() -> dict[str, Callable[[], DataTask]]:
    """Return a loader for each included task, by suite and name: "demo/past"."""
    files = sorted(FOLDER.glob("*/*.yaml"))
    return {f"{file.parent.name}/{file.stem}": partial(load_task, file) for file in files}


def _fault(thing: Any) -> str | None:
    """Return why an object is not a usable task; None if it is one."""
    if isinstance(thing, DataTask):
        return None
    return f"it is of the type {type(thing).__name__}, and a task is a Task or an ImageTask"


TASKS: Registry[DataTask] = Registry(
    "task",
    "starmerge_models.tasks",
    fault=_fault,
    built_in=_built_in,
    unknown="No task is called {name!r}, and no such file or folder exists.",
    listing="starmerge tasks",
)
"""Every task by suite and name; other packages and files can add tasks."""


def folder_tasks(folder: Path) -> dict[str, DataTask]:
    """Read the task files of a folder, by name.

    Raises:
        UsageError: There are none, two have one name, or one is broken.
    """
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not files:
        raise UsageError(f"{folder} holds no task files (*.yaml).")
    tasks: dict[str, DataTask] = {}
    for file in files:
        task = load_task(file)
        if task.name in tasks:
            raise UsageError(f"{folder}: two files hold a task called {task.name!r}. Rename one.")
        tasks[task.name] = task
    return tasks


def find_task(
    name: str, own: Iterable[DataTask] = (), columns: Mapping[str, str] | None = None
) -> DataTask:
    """Find a task by its name, or read it from a file or a folder.

    Args:
        name: "llama-3.2/mrpc"; "past", if one suite alone has a task of that name; a task file
            (.yaml); rows (.jsonl, .csv, .parquet) with ``input`` and ``label``; a folder with
            train.jsonl and test.jsonl; the name of a task of an installed package; or one of a
            file, ``path/to/file.py:NAME``.
        own: The user's tasks, which take precedence over those of the package.
        columns: For bare rows, the file's names of ``input``, ``label`` and ``choices``.

    Raises:
        UsageError: There is no such task and no such path, several tasks have the name, or the
            file is broken.
        StarmergeError: The package or the Python file of the task cannot be loaded.
    """
    mine = {task.name: task for task in own}
    if name in mine:
        return mine[name]
    if name in TASKS or is_file_reference(name):
        return TASKS.find(name)
    alike = _alike(name)
    if len(alike) == 1:
        return TASKS[alike[0]]
    if alike:
        raise UsageError(f"{name!r} is the name of several tasks: {', '.join(alike)}. Choose one.")
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return load_task(path)
    if exists(path) and path.suffix != ".py":
        return task_of_rows(path, columns)
    return TASKS.find(name)


def _alike(name: str) -> list[str]:
    """Return the full names of the tasks with this name, in any suite."""
    return [full for full in TASKS if full.partition("/")[2] == name]


def with_rows_of(tasks: Mapping[str, DataTask], files: Mapping[str, Path]) -> list[DataTask]:
    """Replace the rows of some tasks by those of local files, all of which are scored.

    For datasets that cannot be downloaded, or that have a newer version elsewhere. The columns
    must be the same.

    Args:
        tasks: Tasks by the name that the user gave.
        files: JSONL, CSV or Parquet files by that name or by the task's own.

    Raises:
        UsageError: A file's name matches no task, or an image task.
    """
    replaced = dict(tasks)
    for name, file in files.items():
        meant = [full for full, task in tasks.items() if name in (full, task.name)]
        if not meant:
            raise UsageError(f"--data {name}=…: no such task is asked.{nearest(name, tasks)}")
        task = tasks[meant[0]]
        if not isinstance(task, Task):
            raise UsageError(f"--data {name}=…: it is a task of images; change its file instead.")
        replaced[meant[0]] = task.model_copy(update={"source": FileSource(file=file)})
    return list(replaced.values())


def all_rows_of(tasks: Iterable[DataTask]) -> list[DataTask]:
    """Return tasks that score all rows of their files, including those that count as training rows.

    Raises:
        UsageError: No task holds out a share of a file.
    """
    tasks = list(tasks)
    whole = [task.source.with_all_rows() for task in tasks]
    if all(task.source is source for task, source in zip(tasks, whole, strict=True)):
        raise UsageError(
            "--all-rows: none of the tasks has a file of which some rows count as training rows. "
            "Leave the option out."
        )
    return [
        task.model_copy(update={"source": source})
        for task, source in zip(tasks, whole, strict=True)
    ]


def task_of_prompts(name: str, path: Path) -> Task:
    """Make a task for its prompts alone, from rows that need no label.

    Args:
        name: The task's name. If a known task has it, the rows must have that task's columns and
            get its prompt; otherwise the prompt is their ``input``.
        path: JSONL, CSV or Parquet. All its rows are used; but if the rows have labels and no
            known task has the name, the rows that :func:`task_of_rows` holds out are not.

    Raises:
        UsageError: The file is missing or has a broken line, the task is one of images, or several
            tasks have the name.
    """
    if name in TASKS or _alike(name) or TASKS.offers(name):
        task = find_task(name)
        if not isinstance(task, Task):
            raise UsageError(f"{name} is a task of images, which has no prompts.")
        return task.model_copy(update={"source": FileSource(file=path, train_file=path)})
    labelled = all("label" in row for row in read_file(path))
    if labelled:
        source = FileSource(file=path, held_out=HELD_OUT)
    else:
        source = FileSource(file=path, train_file=path)
    return Task(name=name, source=source, prompt="{input}")
