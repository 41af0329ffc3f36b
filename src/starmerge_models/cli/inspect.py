"""``starmerge inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from starmerge_models.cli import asking, resources
from starmerge_models.cli.importing import importing
from starmerge_models.cli.parameters import weighted
from starmerge_models.cli.printing import AsJson, Printer
from starmerge_models.errors import UsageError


def inspect(
    base: Annotated[str, typer.Argument(help="The base: a folder or a Hub id.")],
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="LoRA adapters and full fine-tunes: a folder, an adapter's file, or a Hub id; "
            "NAME=PATH to name it.",
        ),
    ],
    eta: Annotated[
        float, typer.Option(help="STAR's η, in percent: the ranks that it would keep.")
    ] = 40.0,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="CHAIN[:KEY=VALUE,...]",
            help="Merge in memory, and report what is kept of each task: one of [b]starmerge "
            "methods[/b], FILE.py:NAME or a chain, with parameters. Repeatable.",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            "-w",
            metavar="NAME=NUMBER",
            help="A model's weight in these merges, repeatable; else 1.",
        ),
    ] = None,
    merged: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="A merge of the models that is there already, a model or an adapter: tell what it "
            "kept of each task. Repeatable.",
        ),
    ] = None,
    any_base: asking.AnyBase = False,
    common: Annotated[
        bool, typer.Option("--common", help="Take what the models share with the base.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder for inspection.json, tables (CSV) and pictures (PNG, PDF).",
        ),
    ] = None,
    as_json: AsJson = False,
    threads: resources.Threads = None,
    memory: resources.Memory = None,
    report: asking.Report = None,
    overwrite: asking.Overwrite = False,
) -> None:
    """Look at task vectors before a merge, or after one: sizes, spectra, where tasks clash.

    The models' updates are compared tensor by tensor: how large they are and how many directions
    they have, which of them STAR would keep, which tasks use the same inputs and outputs, where
    signs differ, what rounding eats. Nothing is run, and adapters are never blown up. The findings
    at the end say in words what stands out and what to do.

    With -m or --merged it shows how much a merge keeps of each task, and which tasks interfere with
    it.

    Example: starmerge inspect BASE adapters/*

    Example: starmerge inspect BASE adapters/* -m average -m auto -o inspected

    Example: starmerge inspect BASE a b c --merged merged --report inspection.html
    """
    with importing():
        from starmerge_models.methods.pipeline import as_pipeline
        from starmerge_models.recipe import parse_models, paths_by_name
        from starmerge_models.study.inspection.run import inspect as run
        from starmerge_models.study.inspection_files import (
            check_inspection_folder,
            write_inspection,
        )

    asking.check_report(report, overwrite=overwrite)
    if output is not None:
        check_inspection_folder(output, overwrite=overwrite)
    if weight and not method:
        raise UsageError("--weight is for the merges of --method. Give one, or leave it out.")
    entries = weighted(parse_models(models), weight or [])
    named = paths_by_name(entries)
    found = run(
        base,
        named,
        eta=eta,
        methods=[as_pipeline(text) for text in method or []],
        weights=[entry["weight"] for entry in entries],
        merged=merged or (),
        any_base=any_base,
        common=common,
        threads=threads,
        memory=memory,
        progress=True,
    )
    if output is not None:
        write_inspection(output, found, overwrite=overwrite)
    if report is not None:
        from starmerge_models.study.page import write_page
        from starmerge_models.study.page.inspection import inspection_page

        write_page(inspection_page(found), report, overwrite=overwrite)
    printer = Printer(as_json)
    printer.result(found.to_json())
    printer.text(found.report)
    if output is not None:
        printer.text(f"\nInspection: {output}")
    if report is not None:
        printer.text(f"\nReport: {report}")
