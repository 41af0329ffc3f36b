"""``starmerge merge``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from starmerge_models.cli import asking, plans, pushing, resources
from starmerge_models.cli.importing import importing
from starmerge_models.cli.parameters import weighted
from starmerge_models.cli.printing import AsJson, Printer
from starmerge_models.errors import UsageError
from starmerge_models.events import Note, emit

if TYPE_CHECKING:
    from starmerge_models.merging.engine import MergeResult
    from starmerge_models.merging.plan import Plan
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
    as_json: AsJson = False,
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
        from starmerge_models.methods.notation import read_parameters, split_settings
        from starmerge_models.recipe import make_recipe, parse_models
        from starmerge_models.recipe_file import Step, load_recipes
        from starmerge_models.storage import place_of, storage_of

    place = place_of(output)
    if Path(base).suffix in (".yaml", ".yml") and not Path(base).is_dir():
        _check_alone(
            *(models, method, parameter, weight, metric, tokenizer, chat_template),
            *(dtype, kind, rank, max_error, any_base or None, common or None),
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
    printer = Printer(as_json)
    pushing.check(push, last, private=private)
    if push is not None and not dry_run and not fresh and pushing.is_made(last):
        printer.text(f"{output} is there already.")
        pushed = pushing.upload(output, push, private=private, is_merged_now=True)
        printer.result({"output": output, "is_new": False, "pushed": asdict(pushed)})
        printer.text(*pushing.lines_on(pushed))
        return
    workers = resources.workers_of(executor, address, threads, memory)
    if dry_run:
        _plan(before, last, workers, printer, overwrite=overwrite, push=push)
        return
    steps = _carry_out(before, place, workers, printer, overwrite=overwrite, fresh=fresh)
    plan = make_plan(last.recipe, place, overwrite=overwrite)
    for note in plan.notes:
        emit(Note(note))
    for left in (
        storage_of(place).describe_leftovers(place, suffix=fingerprint(plan)) if not fresh else ()
    ):
        emit(Note(left))
    started = time.monotonic()
    result = run(plan, workers, fresh=fresh, progress=True)
    seconds = time.monotonic() - started
    printer.text(*_lines_on(plan, result, seconds))
    sent = None
    if push is not None:
        sent = pushing.upload(output, push, private=private, is_merged_now=True)
        printer.text(*pushing.lines_on(sent))
    content = result.report.content
    printer.result(
        {
            "output": result.path,
            "is_new": True,
            "seconds": seconds,
            "tensors_resumed": result.resumed,
            "summary": result.report.summary(),
            "report": {name: content[name] for name in content if name not in _LONG_PARTS},
            "steps": steps,
            "pushed": None if sent is None else asdict(sent),
        }
    )


def _lines_on(plan: Plan, result: MergeResult, seconds: float) -> list[str]:
    """Return lines for people on a finished merge."""
    lines = []
    if result.resumed:
        lines.append(
            f"{result.resumed} of {len(plan.tensors)} tensors were there already, written by an "
            "earlier run that was killed."
        )
    made = {"gguf": "GGUF"}.get(plan.output.kind, plan.output.kind.capitalize())
    lines.append(f"{plan.recipe.method}: {result.report.summary()}")
    return [*lines, f"{made}: {result.path} ({seconds:.1f} s)"]


_LONG_PARTS = ("tensors", "digests", "contents", "blake3")
"""Parts of a report with an entry for each tensor or file: they are in the output's own report."""


def _check_alone(*options: object) -> None:
    """Make sure that a recipe is given without options that it has fields for.

    Raises:
        UsageError: One of the options is given.
    """
    if any(option is not None for option in options):
        raise UsageError(
            "A recipe says everything itself: give it without models and without --method, "
            "--parameter, --weight, --metric, --tokenizer, --chat-template, --dtype, --as, "
            "--rank, --max-error, --any-base and --common."
        )


def _plan(
    before: Sequence[Step],
    last: Step,
    workers: resources.Workers,
    printer: Printer,
    *,
    overwrite: bool,
    push: str | None,
) -> None:
    """Print the plans of a merge and of the merges that it is made of, and carry out none."""
    from starmerge_models.merging.plan import make_plan
    from starmerge_models.merging.ranks import rank_costs
    from starmerge_models.storage import exists, storage_of

    storage_of(last.output).check_output(last.output, overwrite=overwrite)
    steps: list[dict[str, Any]] = []
    for step in before:
        if all(map(exists, step.needs)):
            # An earlier run may have made this merge: what exists there is not refused yet.
            planned = plans.planned(make_plan(step.recipe, step.output, overwrite=True), workers)
            steps.append({"name": step.name} | planned)
            if not printer.as_json:
                plans.print_plan(planned)
    missing = [str(step.name) for step in before if not exists(step.output)]
    if missing:
        names = ", ".join(missing)
        printer.text(f"Merges that are made of others, {names} among them, have no plan yet.")
        printer.result({"steps": steps, "without_plan": [*missing, last.name]})
        return
    plan = make_plan(last.recipe, last.output, overwrite=overwrite)
    planned = plans.planned(plan, workers)
    if not printer.as_json:
        plans.print_plan(planned)
    costs = None
    if plan.output.kind in ("adapter", "gguf"):
        costs = rank_costs(plan, workers, progress=True)
        if not printer.as_json:
            plans.print_ranks(costs)
    if push is not None:
        printer.text(f"Push: to {push} (nothing sent)")
    ranks = None if costs is None else [asdict(cost) | {"kept": cost.kept} for cost in costs]
    printer.result(planned | {"ranks": ranks, "push": push, "steps": steps})


def _carry_out(
    steps: Sequence[Step],
    output: Place,
    workers: resources.Workers,
    printer: Printer,
    *,
    overwrite: bool,
    fresh: bool,
) -> list[dict[str, Any]]:
    """Carry out the merges that the last one is made of; return a record of each."""
    from starmerge_models.merging.engine import run
    from starmerge_models.merging.plan import make_plan
    from starmerge_models.merging.steps import is_up_to_date
    from starmerge_models.storage import storage_of

    if steps:
        storage_of(output).check_output(output, overwrite=overwrite)
    records: list[dict[str, Any]] = []
    for step in steps:
        # An earlier run may have made this merge, so only an output of another kind is refused.
        plan = make_plan(step.recipe, step.output, overwrite=True)
        record: dict[str, Any] = {"name": step.name, "output": step.output}
        if not fresh and is_up_to_date(plan, progress=True):
            printer.text(f"{step.name}: {step.output} is there already.")
            records.append(record | {"is_new": False})
            continue
        storage_of(step.output).check_output(step.output, overwrite=overwrite)
        summary = run(plan, workers, fresh=fresh, progress=True).report.summary()
        printer.text(f"{step.name}: {summary}")
        records.append(record | {"is_new": True, "summary": summary})
    return records


def _is_adapter(argument: str) -> bool:
    """Tell whether a model of the command line is an adapter."""
    from starmerge_models.checkpoints.lora.formats import is_adapter
    from starmerge_models.checkpoints.source import resolve
    from starmerge_models.recipe import parse_models

    (entry,) = parse_models([argument])
    return is_adapter(resolve(entry["path"], may_be_file=True))
