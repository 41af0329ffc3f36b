"""``starmerge suite``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from starmerge_models.cli import asking
from starmerge_models.cli.importing import importing
from starmerge_models.cli.parameters import parameters_of
from starmerge_models.cli.printing import AsJson, Printer


def suite(
    name: Annotated[
        str | None, typer.Argument(help="A suite, or the YAML file of one.", show_default="list")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the merged models and the results."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="How to merge: one of [b]starmerge methods[/b] or a chain. Repeatable.",
            show_default="average, star, auto",
        ),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            "-p",
            metavar="METHOD.KEY=VALUE",
            help="A parameter of a method, repeatable; KEY=VALUE where there is one method.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The base: a folder or a Hub id.", show_default="the suite's own"),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "-t",
            help="Some of the tasks, separated by commas or repeated; their fine-tunes alone are "
            "merged.",
            show_default="all",
        ),
    ] = None,
    data: asking.Data = None,
    prompts: asking.Prompts = None,
    scorer: asking.Scorer = "generate",
    matching: asking.Matching = "strict",
    rows: asking.Rows = None,
    batch_size: asking.BatchSize = None,
    device: asking.Device = None,
    dtype: asking.Dtype = "auto",
    backend: asking.BackendName = "transformers",
    report: asking.Report = None,
    flat: asking.Flat = None,
    as_json: AsJson = False,
    overwrite: asking.Overwrite = False,
    no_cache: asking.NoCache = False,
) -> None:
    """Repeat a published experiment: merge a suite's fine-tunes, score them and the merges.

    Base, fine-tunes and datasets come from the Hub, or from its cache. Without a name the suites
    are listed, without an output one is shown.

    Example: starmerge suite llama-3.2 -m average -m star --output llama
    """
    with importing():
        from starmerge_models.evaluation.settings import Settings
        from starmerge_models.evaluation.tasks.suites import find_suite, suites
        from starmerge_models.methods.notation import read_parameters
        from starmerge_models.methods.pipeline import make_pipeline
        from starmerge_models.study.suite import run_suite

    printer = Printer(as_json)
    if name is None:
        printer.result([known.model_dump(mode="json") for known in suites().values()])
        for known in suites().values():
            about = f"{known.description} {len(known.tasks)} tasks, {known.base}"
            printer.text(f"{known.name:<12} {about}")
        return
    chosen = find_suite(name)
    if output is None:
        printer.result(chosen.model_dump(mode="json"))
        printer.text(f"{chosen.name}: {chosen.description}\nBase: {chosen.base}")
        for task in chosen.tasks:
            printer.text(f"  {task:<24} {chosen.models.get(task.rpartition('/')[2], '')}")
        printer.text(f"{chosen.notes}\nRun it: starmerge suite {name} --output FOLDER")
        return
    asking.check_report(report, overwrite=overwrite)
    methods = method or ["average", "star", "auto"]
    given = read_parameters(parameter or [], where="-p ")
    result = run_suite(
        chosen,
        output,
        methods=[make_pipeline(name, parameters_of(name, given, methods)) for name in methods],
        base=base,
        tasks=asking.names_of(tasks) if tasks is not None else None,
        rows_of=asking.pairs(data, "--data"),
        prompts=prompts,
        flat=flat,
        settings=Settings(scorer, matching, rows, batch_size, device, dtype, backend),  # type: ignore[arg-type]
        cache=asking.cache_of(no_cache),
        overwrite=overwrite,
        progress=True,
    )
    if report is not None:
        asking.write_suite_report(result, report, overwrite=overwrite)
    printer.result(result.to_json())
    for label, merged in result.merges.items():
        printer.text(f"{label}: {merged.report.summary()}")
    printer.text(f"\n{result.table}\n", f"Results: {result.results}", f"Chart: {result.chart}")
    if result.flat is not None:
        printer.text(f"Flat: {result.flat}")
    if report is not None:
        printer.text(f"Report: {report}")
