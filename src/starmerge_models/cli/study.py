"""``starmerge study``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from starmerge_models.cli import asking, resources
from starmerge_models.cli.importing import importing
from starmerge_models.cli.printing import AsJson, Printer
from starmerge_models.errors import UsageError

if TYPE_CHECKING:
    from starmerge_models.study.store import Store
    from starmerge_models.study.study_file import Study


def study(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[STUDY]",
            help="A study, the YAML file of one, or the folder of one that was run.",
            show_default="list",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the runs, tables and figures. One that has runs of this study already "
            "is gone on with.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Count the runs and estimate the time; make none of them."),
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option(
            help="A suite of [b]starmerge suite[/b], or the YAML file of one, in place of the "
            "study's."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The base: a folder or a Hub id.", show_default="the study's own"),
    ] = None,
    numbers: Annotated[
        str | None,
        typer.Option(
            help="How many models are merged: numbers separated by commas, or all.",
            show_default="the study's own",
        ),
    ] = None,
    combinations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Different sets of models for each number, at most.",
            show_default="the study's own",
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="generate or rank.", show_default="the study's own"),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of a task, at most.", show_default="the study's own"),
    ] = None,
    batch_size: asking.BatchSize = None,
    device: asking.Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the models' weights: auto, float32, bfloat16 or float16.",
            show_default="the study's own",
        ),
    ] = None,
    any_base: asking.AnyBase = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Make the runs again that failed before.")
    ] = False,
    report: asking.Report = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of the report.")
    ] = False,
    no_cache: asking.NoCache = False,
    executor: resources.Executor = "threads",
    address: resources.Address = None,
    threads: resources.Runs = None,
    as_json: AsJson = False,
) -> None:
    """Merge some fine-tunes in many ways, score every merge, and draw what comes out.

    A study names a pool of fine-tunes, methods with grids of parameters, and how many models are
    merged. Every run is merged in memory, asked, and written down at once: a study can be stopped
    at any time, and the same command goes on with it. The studies that come with starmerge repeat
    the figures and tables of the paper, on the demo's models or on those of another suite.

    Without a name the studies are listed; without an output one is shown; the folder of a study
    that was run is drawn anew, without any model.

    Example: starmerge study numbers --suite flan-t5 --dry-run

    Example: starmerge study eta --rows 40 -o eta

    Example: starmerge study my_study.yaml -o runs

    Example: starmerge study my_study.yaml -o runs --executor ray --address auto

    Example: starmerge study runs
    """
    with importing():
        from starmerge_models.study.execute import StudyRunner
        from starmerge_models.study.store import check_compatible, is_store, load_store
        from starmerge_models.study.study_file import find_study, studies

    printer = Printer(as_json)
    if name is None:
        printer.result([known.model_dump(mode="json") for known in studies().values()])
        for known in studies().values():
            about = f"{known.description}{f' ({known.paper})' if known.paper else ''}"
            printer.text(f"{known.name:<12} {about}")
        return
    asking.check_report(report, overwrite=overwrite)
    resources.check_address(executor, address)
    if threads is not None and executor != "ray":
        raise UsageError("--threads is of --executor ray: without it, one run follows another.")
    if is_store(Path(name)):
        if output is None and not dry_run:
            _check_unused(
                f"To draw {name}, nothing but --report is needed",
                suite=suite,
                base=base,
                numbers=numbers,
                combinations=combinations,
                scorer=scorer,
                rows=rows,
                dtype=dtype,
                retry=retry or None,
            )
            _draw(load_store(Path(name)), report, printer, overwrite=overwrite)
            return
        if name not in studies():
            raise UsageError(
                f"{name} is the folder of a study that was run. To draw it anew, give it alone; to "
                "go on with it, give the study's name or file, and the folder with --output."
            )
    chosen = _changed(
        find_study(name),
        suite=suite,
        base=base,
        numbers=None if numbers is None else [_number(part) for part in numbers.split(",")],
        combinations=combinations,
        scorer=scorer,
        rows=rows,
        dtype=dtype,
    )
    if output is None and not dry_run:
        _check_unused("To run the study, give --output FOLDER", report=report, retry=retry or None)
        _show(chosen, printer)
        return
    workers = None
    if executor == "ray":
        from starmerge_models.merging.executors.ray import RayExecutor

        # A model is asked by one thread at a time.
        workers = RayExecutor(address, threads=threads, places=1)
    runner = StudyRunner(
        chosen,
        chosen.settings(batch_size=batch_size, device=device),
        cache=asking.cache_of(no_cache),
        any_base=any_base,
    )
    if dry_run:
        known_runs = None
        if output is not None and is_store(output):
            known_runs = load_store(output)
            check_compatible(output, known_runs.head, runner.head())
        estimate = runner.estimate(known_runs)
        printer.result(asdict(estimate))
        printer.text(str(estimate))
        return
    assert output is not None  # or the study was shown
    with runner.opened(output, retry=retry) as store:
        runner.run(store, executor=workers, progress=True)
        _draw(store, report, printer, overwrite=overwrite)


def _draw(store: Store, report: Path | None, printer: Printer, *, overwrite: bool) -> None:
    """Write tables, figures and page of a store, and print the tables."""
    from starmerge_models.evaluation.results import without_nan
    from starmerge_models.study.outputs import FIGURES, averages_of, write_figures, write_tables

    averages = averages_of(store)
    tables = write_tables(averages)
    write_figures(averages)
    printer.result(
        {
            "study": store.head["study"]["name"],
            "folder": store.folder,
            "runs": store.head.get("planned"),
            "done": len(store.records),
            "averages": without_nan(averages.to_frame().to_dict("records")),
            "figures": store.folder / FIGURES,
        }
    )
    printer.text(tables, f"\nFigures: {store.folder / FIGURES}")
    if report is not None:
        from starmerge_models.study.page import write_page
        from starmerge_models.study.page.study import study_page

        write_page(study_page(averages), report, overwrite=overwrite)
        printer.text(f"Report: {report}")


def _check_unused(remark: str, **options: object) -> None:
    """Make sure that no option is given that would be left unused.

    Raises:
        UsageError: One is.
    """
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)} would not be used. {remark}.")


def _changed(study: Study, **changes: Any) -> Study:
    """Return a study with what the command line gives in place of its own."""
    from starmerge_models.study.study_file import make_study

    given = {key: value for key, value in changes.items() if value is not None}
    return make_study(study.model_dump(exclude_unset=True) | given)


def _number(text: str) -> int | str:
    """Return an integer that is written in digits, and any other text as it is, such as "all"."""
    text = text.strip()
    return int(text) if text.isdecimal() else text


def _show(study: Study, printer: Printer) -> None:
    """Print what a study is and how to run it."""
    from starmerge_models.study.runs import runs_of
    from starmerge_models.study.study_file import pool_of

    pool = pool_of(study)
    runs = runs_of(study, pool)
    merges = [run for run in runs if run.kind == "merge"]
    numbers = list(dict.fromkeys(len(run.models) for run in merges))
    labels = list(dict.fromkeys(run.label for run in merges))
    printer.result(
        study.model_dump(mode="json")
        | {"base": str(pool.base), "runs": len(runs), "merges": len(merges), "labels": labels}
    )
    printer.text(f"{study.name}: {study.description}")
    if study.paper:
        printer.text(f"In arXiv 2502.10339: {study.paper}")
    printer.text(f"Base: {pool.base}", f"Fine-tunes: {', '.join(pool.models)}")
    printer.text(f"Merged at once: {', '.join(map(str, numbers))}", "Methods:")
    printer.text(*(f"  {label}" for label in labels))
    printer.text(f"{len(runs)} runs, {len(merges)} of them merges.")
    if study.notes:
        printer.text(study.notes)
    printer.text("To time it, add --dry-run to this command; to run it, -o FOLDER.")
