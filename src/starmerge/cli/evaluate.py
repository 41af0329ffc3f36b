"""``starmerge evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from starmerge.errors import UsageError, nearest


def check_scorer(scorer: str) -> None:
    """Raise a UsageError unless there is such a scorer."""
    from starmerge.evaluation.scoring import SCORERS

    if scorer not in SCORERS:
        raise UsageError(f"--scorer {scorer} is unknown.{nearest(scorer, SCORERS)}")


def evaluate(
    base: Annotated[str, typer.Argument(help="The base: a folder or a Hub id.")],
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks", "-t", help="Tasks, JSONL files or task folders, separated by commas."
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Adapters and merged models: a folder or Hub id, or NAME=PATH to name it. One "
            "called like a task is that task's own fine-tune, the upper bound.",
        ),
    ] = None,
    scorer: Annotated[
        str, typer.Option(help="generate (greedy, 10 tokens) or rank (likelihood of the labels).")
    ] = "generate",
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows a task, at most.")] = 200,
    json: Annotated[
        Path | None, typer.Option("--json", help="File to write all scores to.")
    ] = None,
) -> None:
    """Score a base, adapters on it and merged models on held-out rows.

    Adapters are applied by PEFT without copying the base. Prints a Markdown table with 95 %
    intervals and, where every task has its own fine-tune, normalised averages.

    Example: starmerge evaluate BASE adapters/digits adapters/past merged -t digits,past
    """
    check_scorer(scorer)
    from starmerge.checkpoints.writer import write_json
    from starmerge.evaluation.runner import evaluate as run
    from starmerge.evaluation.table import LEGEND, differences, markdown
    from starmerge.evaluation.tasks import find_task
    from starmerge.recipe import parse_models

    chosen = [find_task(name) for name in tasks.split(",")]
    entries = parse_models(models or [])
    named = {entry["name"]: entry["path"] for entry in entries}
    if len(named) < len(entries):
        raise UsageError("Two models have the same name. Give each its own with NAME=PATH.")
    if json is not None and (json.is_dir() or not json.absolute().parent.is_dir()):
        raise UsageError(f"--json {json}: give a file in a folder that exists.")
    result = run(base, named, chosen, scorer=scorer, rows=rows, progress=True)
    print("\n\n".join([markdown(result), LEGEND, *differences(result)]))
    if json is not None:
        write_json(json, result.to_json())
        print(f"\nScores: {json}")
