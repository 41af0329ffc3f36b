"""``starmerge tasks``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from starmerge_models.cli.methods import print_faults


def tasks(
    name: Annotated[str | None, typer.Argument(help="A task, to show all of it.")] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own (.yaml), by their name.")
    ] = None,
) -> None:
    """List the tasks to fine-tune on and to evaluate, or show one as its file has it.

    The tasks of installed packages come last, with the package.

    What is shown of a task is a task file: change it, keep it, and name it wherever a task's name
    stands. Rows (.jsonl, .csv, .parquet) with input and label are a task as they are.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from starmerge_models.evaluation.tasks import TASKS, find_task, folder_tasks
    from starmerge_models.evaluation.tasks.files import as_yaml

    own = folder_tasks(task_folder) if task_folder is not None else {}
    if name is not None:
        print(as_yaml(find_task(name, own.values())), end="")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("answers", no_wrap=True)
    table.add_column("what")
    for full, task in {**own, **TASKS.built_in}.items():
        table.add_row(full, task.answers, task.description)
    plugins = TASKS.plugins()
    for plugin in plugins:
        if plugin.thing is not None:
            described = f"{plugin.thing.description} (of {plugin.origin})"
            table.add_row(plugin.name, plugin.thing.answers, escape(described))
    Console().print(table)
    print_faults(plugins)
