"""``starmerge merge``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from starmerge_models.cli import asking, pushing, resources
from starmerge_models.cli.importing import importing
from starmerge_models.cli.parameters import weighted
from starmerge_models.errors import UsageError
from starmerge_models.events import Note, bytes_in_words, emit

if TYPE_CHECKING:
    from starmerge_models.merging.plan import Plan
    from starmerge_models.merging.ranks import RankCost
    from starmerge_models.recipe_file import Step
    from starmerge_models.storage import Place


def merge(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE|RECIPE.yaml",
            help="The base: a folder, a URL (s3://, gs://, az://, hf://), or a Hub id org/name or "
            "org/name@revision; or a recipe, ours or mergekit's. [b]--as adapter[/b] does without: "
            "give the adapters alone.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder to create, or its URL (s3://, gs://, az://); a file for some adapters, "
            "see --as.",
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="LoRA adapters and full fine-tunes: a folder, an adapter's file, a URL, or a Hub "
            "id; NAME=PATH to name it. MODEL+ADAPTER is a model with an adapter folded in, "
            "A\\[0:8],B\\[4:12] layers of several.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="[b]auto[/b], one of [b]starmerge methods[/b], FILE.py:NAME for one in a file, "
            "which is executed, or a chain of them: star+ties, star+ties:eta=60.",
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
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="base|union|MODEL|PATH",
            help="The output's tokenizer: the base's; [b]union[/b], which adds the tokens of all "
            "models, each with its own row; that of a model, or of a folder or Hub id.",
            show_default="base",
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="base|MODEL|PATH",
            help="The output's chat template: the base's, a model's, a Jinja file, or that of a "
            "folder or Hub id.",
            show_default="the tokenizer's",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the output: keep, float32, bfloat16 or float16.", show_default="keep"
        ),
    ] = None,
    kind: Annotated[
        Literal["model", "adapter", "gguf", "unified"] | None,
        typer.Option(
            "--as",
            help="What to write: a model; an adapter, in PEFT's layout or, of a diffusion model, "
            "in that of the merged ones (one file, if OUTPUT ends in .safetensors); or one for "
            "llama.cpp.",
            show_default="model",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="R",
            help="An adapter's highest rank: the best approximation of the merge.",
            show_default="as the merge needs: exact",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Refuse an adapter farther from the merge, relative to the update's norm.",
        ),
    ] = None,
    any_base: asking.AnyBase = False,
    common: Annotated[
        bool,
        typer.Option(
            "--common",
            help="Merge what the models share with the base: heads and towers that one side lacks "
            "are the base's.",
        ),
    ] = False,
    threads: resources.Threads = None,
    memory: resources.Memory = None,
    executor: resources.Executor = "threads",
    address: resources.Address = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, print the plan, write nothing. For an adapter, merge, and tell "
            "the rank that each error costs.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder.")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Begin anew where a killed run of this merge could go on."),
    ] = False,
    push: pushing.Push = None,
    private: pushing.Private = False,
) -> None:
    """Merge fine-tunes of one base into a model that transformers loads, or into an adapter.

    Everything is checked before the first tensor is read. The folder appears when it is complete,
    with a card and merge_report.json in it. A merge that was killed goes on when it is run again;
    so does a push, and the merge is not repeated for it.

    Example: starmerge merge BASE adapters/a adapters/b -o merged -m star -p eta=40

    Example: starmerge merge --as adapter adapters/a adapters/b -o merged-adapter --rank 32

    Example: starmerge merge --as adapter a.safetensors b.safetensors -o style.safetensors

    Example: starmerge merge BASE adapters/* -o merged --push my-name/my-merge --private

    Example: starmerge merge recipe.yaml -o merged

    Example: starmerge merge BASE org/tuned+org/adapter other -o merged -m ties

    Example: starmerge merge recipe.yaml -o /shared/merged --executor ray --address auto

    A file of several recipes with names, of which some are made of others, is run in their order;
    the merges before the last one stay in OUTPUT-steps, and are not repeated.
    """
    with importing():
        from starmerge_models.merging.engine import run
        from starmerge_models.merging.journal import fingerprint
        from starmerge_models.merging.plan import make_plan
        from starmerge_models.merging.ranks import rank_costs
        from starmerge_models.methods.notation import read_parameters, split_settings
        from starmerge_models.recipe import make_recipe, parse_models
        from starmerge_models.recipe_file import Step, load_recipes
        from starmerge_models.storage import place_of, storage_of

    place = place_of(output)
    if Path(base).suffix in (".yaml", ".yml") and not Path(base).is_dir():
        options = (
            *(models, method, parameter, weight, metric, tokenizer, chat_template),
            *(dtype, kind, rank, max_error),
        )
        if any(option is not None for option in options) or any_base or common:
            raise UsageError(
                "A recipe says everything itself: give it without models and without --method, "
                "--parameter, --weight, --metric, --tokenizer, --chat-template, --dtype, --as, "
                "--rank, --max-error, --any-base and --common."
            )
        *before, last = load_recipes(Path(base), place)
    else:
        entries = parse_models(models or [])
        content: dict[str, Any] = {"base": base, "any_base": any_base, "common": common}
        if kind in ("adapter", "gguf") and _is_adapter(base):
            entries = parse_models([base, *(models or [])])
            content["base"] = None
        content["output"] = {"kind": kind, "rank": rank, "max_error": max_error}
        name, own = (None, []) if method is None else split_settings(method)
        given = {
            "method": name,
            "metric": metric,
            "tokenizer": tokenizer,
            "chat_template": chat_template,
            "dtype": dtype,
        }
        content |= {key: value for key, value in given.items() if value is not None}
        content["models"] = weighted(entries, weight or [])
        content["parameters"] = read_parameters([*own, *(parameter or [])], where="-p ")
        before, last = [], Step(make_recipe(content, where="The command line"), place, None)
    recipe = last.recipe
    if pushing.begin(push, last, private=private, dry_run=dry_run, fresh=fresh):
        return
    workers = resources.workers_of(executor, address, threads, memory)
    if before and not _merge_steps(
        before, place, workers, dry_run=dry_run, overwrite=overwrite, fresh=fresh
    ):
        return
    plan = make_plan(recipe, place, overwrite=overwrite)
    if dry_run:
        _print_plan(plan, workers)
        if plan.output.kind in ("adapter", "gguf"):
            _print_ranks(rank_costs(plan, workers, progress=True))
        return
    for note in plan.notes:
        emit(Note(note))
    for left in (
        storage_of(place).describe_leftovers(place, suffix=fingerprint(plan)) if not fresh else ()
    ):
        emit(Note(left))
    started = time.monotonic()
    result = run(plan, workers, fresh=fresh, progress=True)
    if result.resumed:
        print(
            f"{result.resumed} of {len(plan.tensors)} tensors were there already, written by an "
            "earlier run that was killed."
        )
    print(f"{plan.recipe.method}: {result.report.summary()}")
    made = {"gguf": "GGUF"}.get(plan.output.kind, plan.output.kind.capitalize())
    print(f"{made}: {result.path} ({time.monotonic() - started:.1f} s)")
    if push is not None:
        pushing.upload(output, push, private=private, is_merged_now=True)


def _merge_steps(
    steps: Sequence[Step],
    output: Place,
    workers: resources.Workers,
    *,
    dry_run: bool,
    overwrite: bool,
    fresh: bool,
) -> bool:
    """Carry out the merges that the last one is made of; return whether that one can be planned."""
    from starmerge_models.merging.engine import run
    from starmerge_models.merging.plan import make_plan
    from starmerge_models.merging.steps import is_up_to_date
    from starmerge_models.storage import exists, storage_of

    storage_of(output).check_output(output, overwrite=overwrite)
    for step in steps:
        if dry_run and not all(map(exists, step.needs)):
            continue
        # What stands there may be this merge, so only what is no merge is refused.
        plan = make_plan(step.recipe, step.output, overwrite=True)
        if dry_run:
            _print_plan(plan, workers)
            continue
        if not fresh and is_up_to_date(plan, progress=True):
            print(f"{step.name}: {step.output} is there already.")
            continue
        storage_of(step.output).check_output(step.output, overwrite=overwrite)
        result = run(plan, workers, fresh=fresh, progress=True)
        print(f"{step.name}: {result.report.summary()}")
    left = [str(step.name) for step in steps if dry_run and not exists(step.output)]
    if left:
        print(f"Merges that are made of others, {', '.join(left)} among them, have no plan yet.")
    return not left


def _is_adapter(argument: str) -> bool:
    """Tell whether a model of the command line is an adapter."""
    from starmerge_models.checkpoints.lora.formats import is_adapter
    from starmerge_models.checkpoints.source import resolve
    from starmerge_models.recipe import parse_models

    (entry,) = parse_models([argument])
    return is_adapter(resolve(entry["path"], may_be_file=True))


def _print_ranks(costs: Sequence[RankCost]) -> None:
    """Print the rank that each error costs."""
    from rich.console import Console
    from rich.table import Table

    table = Table("rank", "relative error", "of the update kept", title="Ranks of the adapter")
    for cost in costs:
        table.add_row(str(cost.rank), f"{cost.error:.3g}", f"{cost.kept:.2%}")
    Console().print(table)


def _print_plan(plan: Plan, workers: resources.Workers) -> None:
    """Print what a merge would do."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from starmerge_models.merging.executors.threads import Threads
    from starmerge_models.storage import storage_of

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
        size = bytes_in_words(storage_of(file).state(file).size)
        console.print(f"Metric: {file} ({size}); merged in {plan.use_of_metric}", markup=False)
        if plan.unused_prompts:
            unused = ", ".join(plan.unused_prompts)
            console.print(f"Note: its prompts of {unused} are of no model.", markup=False)
    for note in plan.notes:
        console.print(f"Note: {note}", markup=False)
    merged = len(plan.merged)
    console.print(f"Tensors: {merged} merged, {len(plan.tensors) - merged} left as they are")
    console.print(
        f"Read: {bytes_in_words(plan.bytes_to_read)}; write: {bytes_in_words(plan.bytes_to_write)}"
    )
    if isinstance(workers, Threads):
        peak = bytes_in_words(plan.memory(workers.threads, workers.memory))
        console.print(f"Memory for tensors: about {peak}; threads: {workers.threads}")
    else:
        largest = bytes_in_words(plan.memory(1, 0))
        console.print(f"Memory for tensors: a worker needs about {largest} for the largest")
    console.print(f"Output: {plan.path} (nothing written)")
