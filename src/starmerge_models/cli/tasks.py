"""``starmerge tasks``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from starmerge_models.cli.importing import importing
from starmerge_models.cli.methods import print_faults
from starmerge_models.cli.printing import AsJson, Printer


def tasks(
    name: Annotated[str | None, typer.Argument(help="A task, to show all of it.")] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own (.yaml), by their name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks to fine-tune on and to evaluate, or show one as a task file.

    The tasks of installed packages come last, with the package.

    A task is shown as its YAML file: save it, change it, and give its path where a task's name is
    expected. Files of rows (.jsonl, .csv, .parquet) with input and label are tasks, too.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    with importing():
        from starmerge_models.evaluation.tasks import TASKS, find_task, folder_tasks
        from starmerge_models.evaluation.tasks.files import as_yaml

    printer = Printer(as_json)
    own = folder_tasks(task_folder) if task_folder is not None else {}
    if name is not None:
        task = find_task(name, own.values())
        printer.result(task.model_dump(mode="json", exclude_unset=True))
        printer.text(as_yaml(task).rstrip())
        return
    plugins = TASKS.plugins()
    listed = [
        *((name, task, None) for name, task in {**own, **TASKS.built_in}.items()),
        *((plugin.name, plugin.thing, plugin.origin) for plugin in plugins if plugin.thing),
    ]
    printer.result(
        [
            {
                "name": name,
                "answers": task.answers,
                "description": task.description,
                "origin": None if origin is None else origin.record(),
            }
            for name, task, origin in listed
        ]
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("answers", no_wrap=True)
    table.add_column("description")
    for listed_name, task, origin in listed:
        of = "" if origin is None else f" (of {origin})"
        table.add_row(listed_name, task.answers, escape(f"{task.description}{of}"))
    if not as_json:
        Console().print(table)
    print_faults(plugins)
