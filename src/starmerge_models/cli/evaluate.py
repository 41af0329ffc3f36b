"""``starmerge evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from starmerge_models.cli import asking
from starmerge_models.cli.importing import importing
from starmerge_models.cli.printing import AsJson, Printer
from starmerge_models.errors import UsageError


def evaluate(
    base: Annotated[str, typer.Argument(help="The base: a folder or a Hub id.")],
    tasks: asking.Tasks,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Adapters and merged models: a folder or Hub id, or NAME=PATH to name it. One "
            "called like a task is that task's own fine-tune, the upper bound.",
        ),
    ] = None,
    task_folder: asking.TaskFolder = None,
    data: asking.Data = None,
    columns: asking.Columns = None,
    all_rows: asking.AllRows = False,
    prompts: asking.Prompts = None,
    scorer: asking.Scorer = "generate",
    matching: asking.Matching = "strict",
    rows: asking.Rows = None,
    batch_size: asking.BatchSize = None,
    device: asking.Device = None,
    dtype: asking.Dtype = "auto",
    backend: asking.BackendName = "transformers",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the results: table, scores and every prediction, for pandas.",
        ),
    ] = None,
    predictions: Annotated[
        str, typer.Option(help="Format of the predictions: parquet or jsonl.")
    ] = "parquet",
    report: asking.Report = None,
    flat: asking.Flat = None,
    as_json: AsJson = False,
    overwrite: asking.Overwrite = False,
    no_cache: asking.NoCache = False,
) -> None:
    """Score a base, adapters on it and merged models on the same rows of some tasks.

    Adapters are applied by PEFT without copying the base. Prints a Markdown table with 95 %
    intervals, tests of the merges against each other and, where every task has its own fine-tune,
    normalised averages.

    Example: starmerge evaluate BASE adapters/digits adapters/past merged -t digits,past -o scores

    Example: starmerge evaluate BASE merged -t mail.csv --columns input=text,label=kind --all-rows
    """
    with importing():
        from starmerge_models.checkpoints.source import check_named
        from starmerge_models.evaluation.flat import check_flat, write_flat
        from starmerge_models.evaluation.results import check_results, without_nan, write_results
        from starmerge_models.evaluation.runner import evaluate as run
        from starmerge_models.evaluation.settings import Settings
        from starmerge_models.evaluation.table import report as reported
        from starmerge_models.evaluation.tasks.prompts import with_prompts_of
        from starmerge_models.recipe import parse_models, paths_by_name

    settings = Settings(scorer, matching, rows, batch_size, device, dtype, backend)  # type: ignore[arg-type]
    if predictions not in ("parquet", "jsonl"):
        raise UsageError(f"--predictions is parquet or jsonl, not {predictions}.")
    if output is not None:
        check_results(output, overwrite=overwrite)
    asking.check_report(report, overwrite=overwrite)
    named = paths_by_name(parse_models(models or []))
    check_named(base, *named.values())
    chosen, wording = asking.tasks_of(tasks, task_folder, data, columns, all_rows=all_rows), None
    if prompts is not None:
        chosen, wording = with_prompts_of(prompts, chosen)
    if flat is not None:
        check_flat(flat, named, [task.name for task in chosen], overwrite=overwrite)
    result = run(base, named, chosen, settings, cache=asking.cache_of(no_cache), progress=True)
    table = "\n\n".join([reported(result), *([wording] if wording else [])])
    printer = Printer(as_json)
    printer.result(without_nan(result.to_json()))
    printer.text(table)
    if output is not None:
        write_results(
            output,
            result,
            table,
            predictions=predictions,  # type: ignore[arg-type]
            overwrite=overwrite,
        )
        printer.text(f"\nResults: {output}")
    if report is not None:
        from starmerge_models.study.page import write_page
        from starmerge_models.study.page.evaluation import evaluation_page, evaluation_title

        title = evaluation_title(base, result)
        remarks = [wording] if wording else []
        page = evaluation_page(result, title=title, remarks=remarks)
        write_page(page, report, overwrite=overwrite)
        printer.text(f"\nReport: {report}")
    if flat is not None:
        printer.text(f"Flat: {write_flat(flat, result, overwrite=overwrite)}")
