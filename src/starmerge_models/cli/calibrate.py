"""``starmerge calibrate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from starmerge_models.cli import asking
from starmerge_models.cli.importing import importing
from starmerge_models.cli.printing import AsJson, Printer
from starmerge_models.errors import UsageError


def calibrate(
    base: Annotated[str, typer.Argument(help="The base: a folder or a Hub id.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="The models that will be merged: folders, Hub ids or NAME=PATH, named as their "
            "prompts are. These are then read along the merge, layer by layer: [b]regmean[/b] "
            "keeps more with such a file, which serves this merge alone.",
            show_default="none: the base reads the prompts",
        ),
    ] = None,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: metric.safetensors.")
    ],
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Texts to read: .txt, a line a text, or .jsonl with 'text'.",
            show_default="the base writes some itself",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK[=ROWS]",
            help="Keep moments of a task's prompts, too, by its name. ROWS are .jsonl, .csv or "
            ".parquet: with the columns of the task of that name, if there is one in [b]starmerge "
            "tasks[/b], else with 'input'; they need no label. Or a task file (.yaml). Without "
            "ROWS: the training rows of a task of [b]starmerge tasks[/b], or of a task file. "
            "Repeatable.",
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sequences that the base writes, or texts that are read, at most.",
            show_default="128, or all texts",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that the base writes to each, or that are read of each text, at most.",
            show_default="80, or as many as the base takes",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Prompts of a task, at most.")] = 16,
    seed: Annotated[int, typer.Option(help="Of what the base writes.")] = 0,
    any_base: asking.AnyBase = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for the sums, such as 4GB. Where they take more, the base reads the text "
            "several times.",
            show_default="a quarter of the machine's, or half of a GPU's free memory",
        ),
    ] = None,
    device: asking.Device = None,
    dtype: asking.Dtype = "auto",
    as_json: AsJson = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a metric file.")] = False,
) -> None:
    """Measure what a base's linear modules read, for merges that ask for it.

    Has the base read text and writes the second moments of the inputs of its linear modules to a
    file. Without any data the base writes the text itself, by sampling. No label is ever read.

    Example: starmerge calibrate BASE -o metric.safetensors

    Example: starmerge calibrate BASE -o metric.safetensors --prompts digits --prompts s=rows.csv

    Example: starmerge calibrate BASE a/pos a/past -o m.safetensors --prompts pos --prompts past
    """
    with importing():
        from starmerge_models.calibration.run import calibrate as run

    printer = Printer(as_json)
    result = run(
        base,
        output,
        models or (),
        texts=texts,
        prompts=_tasks(prompts or []),
        sequences=sequences,
        length=length,
        rows=rows,
        seed=seed,
        any_base=any_base,
        memory=memory,
        device=device,
        dtype=dtype,  # type: ignore[arg-type]
        overwrite=overwrite,
        announce=printer.text,
        progress=True,
    )
    printer.result(asdict(result))
    for note in result.notes:
        printer.text(f"Without a moment: {note}")
    printer.text(result.summary(), f"Metric: {result.path}")


def _tasks(arguments: list[str]) -> dict[str, str]:
    """Read TASK or TASK=ROWS; a task that is named alone gets its own name.

    Raises:
        UsageError: A name or a path is empty, or a name is given twice.
    """
    from starmerge_models.evaluation.tasks import find_task

    found: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not name or (equals and not path):
            raise UsageError(f"--prompts {argument}: write TASK or TASK=ROWS.")
        if not equals:
            name, path = find_task(argument).name, argument
        if name in found:
            raise UsageError(f"--prompts {name} is given twice. Leave one out.")
        found[name] = path
    return found
