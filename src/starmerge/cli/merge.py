"""``starmerge merge``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from starmerge.cli import asking
from starmerge.cli.parameters import parameters
from starmerge.errors import UsageError, nearest
from starmerge.progress import bytes_in_words

if TYPE_CHECKING:
    from starmerge.merging.plan import Plan
    from starmerge.merging.workers import Workers


def merge(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE|RECIPE.yaml",
            help="The base, a folder or a Hub id org/name or org/name@revision; or a recipe, "
            "ours or mergekit's.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="LoRA adapters and full fine-tunes: a folder or Hub id, or NAME=PATH to name it.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="[b]auto[/b], one of [b]starmerge methods[/b], FILE.py:NAME for one in a file, "
            "which is executed, or a chain of them: star+ties.",
            show_default="star",
        ),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            "-p",
            metavar="KEY=VALUE",
            help="A parameter of the method, repeatable; METHOD.KEY=VALUE where several have it.",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight", "-w", metavar="NAME=NUMBER", help="A model's weight, repeatable; else 1."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="What [b]starmerge calibrate[/b] wrote for this base: spectral methods merge in "
            "whitened inputs, and regmean knows the tasks' prompts.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the output: keep, float32, bfloat16 or float16.", show_default="keep"
        ),
    ] = None,
    any_base: asking.AnyBase = False,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tensors to merge at once.",
            show_default="OMP_NUM_THREADS, or all processors",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for tensors in work, such as 4GB; one that needs more is merged alone.",
            show_default="a quarter of the machine's",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder.")
    ] = False,
) -> None:
    """Merge fine-tunes of one base into a model that transformers loads.

    Everything is checked before the first tensor is read. The folder appears when it is complete,
    with a model card and merge_report.json in it.

    Example: starmerge merge BASE adapters/a adapters/b -o merged -m star -p eta=40

    Example: starmerge merge recipe.yaml -o merged
    """
    from starmerge.checkpoints.writer import leftovers
    from starmerge.merging.engine import run
    from starmerge.merging.plan import make_plan
    from starmerge.merging.workers import Workers
    from starmerge.recipe import load_recipe, make_recipe, parse_models

    if Path(base).suffix in (".yaml", ".yml") and not Path(base).is_dir():
        if models or method or parameter or weight or metric or dtype or any_base:
            raise UsageError(
                "A recipe says everything itself: give it without models and without "
                "--method, --parameter, --weight, --metric, --dtype and --any-base."
            )
        recipe = load_recipe(Path(base))
    else:
        content: dict[str, Any] = {"base": base, "any_base": any_base}
        given = {"method": method, "metric": metric, "dtype": dtype}
        content |= {key: value for key, value in given.items() if value is not None}
        content["models"] = _weighted(parse_models(models or []), weight or [])
        content["parameters"] = parameters(parameter or [])
        recipe = make_recipe(content, where="The command line")
    plan = make_plan(recipe, output, overwrite=overwrite)
    workers = Workers(threads, memory)
    if dry_run:
        _print_plan(plan, workers)
        return
    for folder in leftovers(output):
        print(f"Note: {folder} is of a merge that still runs, or was killed: then delete it.")
    started = time.monotonic()
    result = run(plan, threads=threads, memory=memory, progress=True)
    print(f"{plan.recipe.method}: {result.report.summary()}")
    print(f"Model: {result.path} ({time.monotonic() - started:.1f} s)")


def _weighted(models: list[dict[str, str]], arguments: list[str]) -> list[dict[str, Any]]:
    """Give the models their weights, given as NAME=NUMBER."""
    if not models:
        raise UsageError("There is no model to merge. Give adapters or fine-tunes after the base.")
    weights: dict[str, float] = {}
    for text in arguments:
        name, equals, number = text.rpartition("=")
        if not equals:
            raise UsageError(f"--weight {text}: a weight is given as NAME=NUMBER, as in a=0.5.")
        names = [model["name"] for model in models]
        if name not in names:
            raise UsageError(f"--weight {text}: no model is called {name!r}.{nearest(name, names)}")
        if name in weights:
            raise UsageError(f"--weight {name} is given twice. Leave one out.")
        try:
            weights[name] = float(number)
        except ValueError as error:
            raise UsageError(f"--weight {text}: {number!r} is not a number.") from error
    return [{**model, "weight": weights.get(model["name"], 1.0)} for model in models]


def _print_plan(plan: Plan, workers: Workers) -> None:
    """Print what a merge would do."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    headers = ("model", "weight", "kind", "tensors", "rank", "read")
    table = Table(*headers, title=f"Plan: {plan.recipe.method}")
    for entry, model in zip(plan.recipe.models, plan.models, strict=True):
        ranks = {model.rank(tensor) for tensor in model.tensors}
        read = sum(info.nbytes for tensor in model.tensors for info in model.inputs(tensor))
        bounds = sorted(rank for rank in ranks if rank is not None)
        shown = "full" if not bounds else "–".join(map(str, dict.fromkeys((bounds[0], bounds[-1]))))
        count = str(len(model.tensors))
        weight = f"{entry.weight:g}"
        table.add_row(escape(model.name), weight, model.kind, count, shown, bytes_in_words(read))
    console.print(table)
    for key, value in plan.recipe.parameters.items():
        console.print(f"{key}: {json.dumps(value, ensure_ascii=False)}", markup=False)
    for name, origin in plan.pipeline.plugins.items():
        console.print(f"{name}: of {origin}", markup=False)
    if plan.reason is not None:
        console.print(plan.reason, markup=False)
    if plan.metric is not None:
        file = plan.metric.file
        size = bytes_in_words(file.stat().st_size)
        console.print(f"Metric: {file} ({size}); merged in {plan.use_of_metric}", markup=False)
        if plan.unused_prompts:
            unused = ", ".join(plan.unused_prompts)
            console.print(f"Note: its prompts of {unused} are of no model.", markup=False)
    merged = len(plan.merged)
    console.print(f"Tensors: {merged} merged, {len(plan.tensors) - merged} left as they are")
    console.print(
        f"Read: {bytes_in_words(plan.bytes_to_read)}; write: {bytes_in_words(plan.bytes_to_write)}"
    )
    peak = bytes_in_words(plan.memory(workers.threads, workers.memory))
    console.print(f"Memory for tensors: about {peak}; threads: {workers.threads}")
    console.print(f"Output: {plan.output} (nothing written)")
