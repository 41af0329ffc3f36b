"""Options of the commands that ask models something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starmerge_models.errors import UsageError

if TYPE_CHECKING:
    from starmerge_models.evaluation.cache import ScoreCache
    from starmerge_models.evaluation.prepared_tasks import AnyTask
    from starmerge_models.study.suite import SuiteResult

Tasks = Annotated[
    list[str],
    typer.Option(
        "--tasks",
        "-t",
        help="Separated by commas, or repeated: names of [b]starmerge tasks[/b], task files "
        "(.yaml), rows (.jsonl, .csv, .parquet), folders with train.jsonl and test.jsonl, "
        "FILE.py:NAME, or lm-eval:NAME.",
    ),
]
TaskFolder = Annotated[
    Path | None, typer.Option(help="Folder with task files of your own (.yaml), by their name.")
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="NAME=COLUMN,...",
        help="Which columns of bare rows are input, label and choices, where they have other "
        "names: input=text,label=kind.",
    ),
]
AllRows = Annotated[
    bool,
    typer.Option(
        "--all-rows",
        help="Score all rows of a file. Else one in five of bare rows is scored, and the others "
        "count as training rows.",
    ),
]
Flat = Annotated[
    Path | None,
    typer.Option(
        "--flat",
        metavar="FOLDER",
        help="Also write the scores as the paper's scripts do: FOLDER/TASKS/METHOD.json, each "
        "with {task: score}.",
    ),
]
Scorer = Annotated[
    str,
    typer.Option(help="generate (greedy, the paper's rule) or rank (likelihood of the answers)."),
]
Matching = Annotated[
    str,
    typer.Option(
        help="How responses are read: strict (whole words), or reference: by the first substring "
        "as the paper's scripts do, for comparison with published numbers."
    ),
]
Rows = Annotated[
    int | None,
    typer.Option(min=1, help="Rows of a task, at most.", show_default="all of its sample"),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Rows asked at once, at most.", show_default="as many as fit"
    ),
]
AnyBase = Annotated[
    bool,
    typer.Option(
        "--any-base",
        help="Accept models that name another base, or whose config differs from the base's.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Where models run: cpu, cuda, cuda:1.", show_default="the GPU, if any"),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the models' weights: auto (as stored, where the processor computes in it), "
        "float32, bfloat16 or float16."
    ),
]
BackendName = Annotated[
    str,
    typer.Option("--backend", help="transformers, or vllm: on a GPU, with the extra of that name."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="TASK=FILE",
        help="Score the rows of a file (.jsonl, .csv, .parquet) in place of the task's own, which "
        "have the same columns. Repeatable.",
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="PACKAGE",
        help="Ask in the words of an installed package, where it has some for a task: fusion-bench "
        "has those that the tanganke/flan-t5 adapters for GLUE were trained on.",
        show_default="the tasks' own",
    ),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        help="Ask everything anew. Else what a model has answered before is taken from the cache, "
        "by the content of its files and of the task.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        help="Write a page to read in a browser, all in one file: charts, tables that sort and "
        "filter, answers. Needs the extra [b]study[/b].",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier run has left there.")
]


def cache_of(no_cache: bool) -> ScoreCache | None:
    """Return the user's cache of answers, unless none is wanted."""
    from starmerge_models.evaluation.cache import ScoreCache

    return None if no_cache else ScoreCache()


def pairs(arguments: Sequence[str] | None, option: str) -> dict[str, Path]:
    """Read what an option gives as NAME=PATH.

    Raises:
        UsageError: There is no equals sign, no such file, or one name twice.
    """
    found: dict[str, Path] = {}
    for argument in arguments or ():
        name, equals, path = argument.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} {argument}: write NAME=PATH.")
        if not Path(path).is_file():
            raise UsageError(f"{option} {argument}: there is no file {path}.")
        if name in found:
            raise UsageError(f"{option} {name} is given twice. Leave one out.")
        found[name] = Path(path)
    return found


def names_of(tasks: Sequence[str]) -> list[str]:
    """Return the names in a repeatable option, each of which has some, separated by commas."""
    return [name.strip() for text in tasks for name in text.split(",") if name.strip()]


def columns_of(columns: str | None) -> dict[str, str]:
    """Read what an option gives as NAME=COLUMN,...

    Raises:
        UsageError: There is no equals sign, or one name twice.
    """
    found: dict[str, str] = {}
    for part in columns.split(",") if columns is not None else ():
        name, equals, column = (text.strip() for text in part.partition("="))
        if not (equals and name and column):
            raise UsageError(
                f"--columns {columns}: write NAME=COLUMN, such as --columns input=text,label=kind."
            )
        if name in found:
            raise UsageError(f"--columns {name} is given twice. Leave one out.")
        found[name] = column
    return found


def tasks_of(
    tasks: Sequence[str],
    folder: Path | None,
    data: Sequence[str] | None,
    columns: str | None = None,
    *,
    all_rows: bool = False,
) -> list[AnyTask]:
    """Find the tasks of an option; those of the harness, which have its prefix, come last.

    Args:
        tasks: The option, as often as it is given.
        folder: The user's own task files.
        data: Files in place of some tasks' rows, TASK=FILE.
        columns: What bare rows call their columns.
        all_rows: Whether all rows of files are scored.

    Raises:
        UsageError: There is no such task, or an option does not fit the tasks.
    """
    from starmerge_models.evaluation.tasks import all_rows_of, find_task, folder_tasks, with_rows_of
    from starmerge_models.evaluation.tasks.lm_eval import PREFIX, load_tasks

    names = names_of(tasks)
    plain = [name for name in names if not name.startswith(PREFIX)]
    # The folder is the harness's where all tasks are: it may hold its files, or ours.
    own = folder_tasks(folder).values() if folder is not None and plain else ()
    mapped = columns_of(columns)
    by_name = {name: find_task(name, own, mapped) for name in plain}
    if mapped and not any(getattr(task.source, "columns", None) for task in by_name.values()):
        raise UsageError(
            f"--columns {columns}: none of the tasks is a file of bare rows. Leave the option out, "
            "or name the columns in the task's file."
        )
    found = with_rows_of(by_name, pairs(data, "--data"))
    if all_rows:
        found = all_rows_of(found)
    harness = [name for name in names if name.startswith(PREFIX)]
    return [*found, *(load_tasks(harness, folder) if harness else ())]


def check_report(report: Path | None, *, overwrite: bool) -> None:
    """Make sure that the page of a report can be made, if one is wanted, before models are asked.

    Raises:
        UsageError: The file is no HTML file by its name, or may not be replaced.
        ModuleNotFoundError: A package of the extra ``study`` is missing.
    """
    if report is not None:
        from starmerge_models.study.page import check_page

        check_page(report, overwrite=overwrite)


def write_suite_report(result: SuiteResult, report: Path, *, overwrite: bool) -> None:
    """Write the page of a suite."""
    from starmerge_models.study.page import write_page
    from starmerge_models.study.page.evaluation import evaluation_page

    page = evaluation_page(result.evaluation, title=result.title, remarks=result.remarks)
    write_page(page, report, overwrite=overwrite)
