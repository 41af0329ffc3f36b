"""``starmerge choose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from starmerge_models.cli import asking
from starmerge_models.cli.importing import importing
from starmerge_models.cli.printing import AsJson, Printer

_DEFAULTS = "defaults"


def choose(
    base: Annotated[str, typer.Argument(help="The base: a folder or a Hub id.")],
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="The models to merge: LoRA adapters and full fine-tunes, a folder or Hub id, or "
            "NAME=PATH to name it. One called like a task is that task's fine-tune, the upper "
            "bound.",
        ),
    ],
    tasks: asking.Tasks,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="CHAIN[:KEY=VALUE,...]",
            help="A candidate: one of [b]starmerge methods[/b], FILE.py:NAME or a chain, with "
            "parameters. "
            "Repeatable; the first given is preferred where rows cannot tell. [b]defaults[/b] "
            "means the default ones.",
            show_default="defaults",
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Rows of a task in the last round, at most; 8 at least.")
    ] = 64,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Rows asked of the candidates in all, at most. After each round only as many "
            "candidates go on as the rest pays for, even if they are not clearly behind.",
            show_default="no limit",
        ),
    ] = None,
    task_folder: asking.TaskFolder = None,
    data: asking.Data = None,
    columns: asking.Columns = None,
    scorer: asking.Scorer = "generate",
    matching: asking.Matching = "strict",
    batch_size: asking.BatchSize = None,
    device: asking.Device = None,
    dtype: asking.Dtype = "auto",
    any_base: asking.AnyBase = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="RECIPE.yaml",
            help="File for the recipe of the chosen merge, for [b]starmerge merge[/b].",
        ),
    ] = None,
    as_json: AsJson = False,
    report: asking.Report = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of recipe and report.")
    ] = False,
    no_cache: asking.NoCache = False,
) -> None:
    """Find out on a few rows how to merge: candidates race, a recipe comes out.

    Nothing is written but the recipe: each candidate is added to the loaded base and taken back.
    All are asked 8 rows of each task, then 16, 32 and so on; a row is asked once. One that is
    clearly behind the best stops. Where the rows show no clear difference, that is said, and the
    first given of those that are as good as even with the best is taken.

    The rows are others than [b]starmerge evaluate[/b] scores, where a task has others.

    Example: starmerge choose BASE adapters/past adapters/pos -t past,pos -o recipe.yaml

    Example: starmerge choose BASE a b -t a,b -m star:eta=20 -m star:eta=60 -m star+ties:k=30

    Then: starmerge merge recipe.yaml -o merged
    """
    with importing():
        from starmerge_models.checkpoints.source import check_named
        from starmerge_models.evaluation.settings import Settings
        from starmerge_models.methods.pipeline import as_pipeline
        from starmerge_models.recipe import parse_models, paths_by_name
        from starmerge_models.recipe_file import check_recipe_file, write_recipe
        from starmerge_models.study.candidates import default_candidates, named_candidates
        from starmerge_models.study.choose import choose as run

    settings = Settings(scorer, matching, rows, batch_size, device, dtype)  # type: ignore[arg-type]
    if output is not None:
        check_recipe_file(output, overwrite=overwrite)
    asking.check_report(report, overwrite=overwrite)
    candidates = [
        found
        for text in method or [_DEFAULTS]
        for found in (default_candidates() if text == _DEFAULTS else [as_pipeline(text)])
    ]
    named_candidates(candidates)  # before the rows of tasks are read
    named = paths_by_name(parse_models(models))
    check_named(base, *named.values())
    choice = run(
        base,
        named,
        asking.tasks_of(tasks, task_folder, data, columns),
        candidates,
        settings=settings,
        budget=budget,
        any_base=any_base,
        cache=asking.cache_of(no_cache),
        progress=True,
    )
    if output is not None:
        write_recipe(choice.recipe, output, overwrite=overwrite)
    if report is not None:
        from starmerge_models.study.page import write_page
        from starmerge_models.study.page.choice import choice_page, choice_title

        page = choice_page(choice, title=choice_title(base, choice))
        write_page(page, report, overwrite=overwrite)
    printer = Printer(as_json)
    printer.result(choice.to_json())
    printer.text(choice.report)
    if output is not None:
        printer.text(f"\nRecipe: {output}. Merge with: starmerge merge {output} -o FOLDER")
    if report is not None:
        printer.text(f"\nReport: {report}")
