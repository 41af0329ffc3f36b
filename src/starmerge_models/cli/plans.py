"""Printing the plan of a merge, for people or as plain data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starmerge_models.events import bytes_in_words

if TYPE_CHECKING:
    from starmerge_models.cli.resources import Workers
    from starmerge_models.merging.plan import Plan
    from starmerge_models.merging.ranks import RankCost


def print_ranks(costs: Sequence[RankCost]) -> None:
    """Print the rank that each error costs."""
    from rich.console import Console
    from rich.table import Table

    table = Table("rank", "relative error", "of the update kept", title="Ranks of the adapter")
    for cost in costs:
        table.add_row(str(cost.rank), f"{cost.error:.3g}", f"{cost.kept:.2%}")
    Console().print(table)


def planned(plan: Plan, workers: Workers) -> dict[str, Any]:
    """Return what a merge would do, as plain data."""
    from starmerge_models.merging.executors.threads import Threads
    from starmerge_models.storage import storage_of

    models = []
    for entry, model in zip(plan.recipe.models, plan.models, strict=True):
        ranks = {model.rank(tensor) for tensor in model.tensors}
        models.append(
            {
                "name": model.name,
                "weight": entry.weight,
                "kind": model.kind,
                "tensors": len(model.tensors),
                "ranks": sorted(rank for rank in ranks if rank is not None),
                "bytes_to_read": sum(
                    info.nbytes for tensor in model.tensors for info in model.inputs(tensor)
                ),
            }
        )
    metric = None
    if plan.metric is not None:
        file = plan.metric.file
        metric = {
            "file": str(file),
            "bytes": storage_of(file).state(file).size,
            "use": plan.use_of_metric,
            "unused_prompts": plan.unused_prompts,
        }
    threads, memory = None, plan.memory(1, 0)
    if isinstance(workers, Threads):
        threads, memory = workers.threads, plan.memory(workers.threads, workers.memory)
    return {
        "method": plan.recipe.method,
        "parameters": plan.recipe.parameters,
        "plugins": {name: str(origin) for name, origin in plan.pipeline.plugins.items()},
        "reason": plan.reason,
        "models": models,
        "metric": metric,
        "notes": list(plan.notes),
        "passes_before": plan.pipeline.passes,
        "tensors_merged": len(plan.merged),
        "tensors_copied": len(plan.tensors) - len(plan.merged),
        "bytes_to_read": plan.bytes_to_read,
        "bytes_to_write": plan.bytes_to_write,
        "threads": threads,
        "memory": memory,
        "kind": plan.output.kind,
        "output": str(plan.path),
    }


def print_plan(plan: dict[str, Any]) -> None:
    """Print what a merge would do, for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    headers = ("model", "weight", "kind", "tensors", "rank", "read")
    table = Table(*headers, title=f"Plan: {plan['method']}")
    for model in plan["models"]:
        ranks = model["ranks"]
        shown = "–".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else "full"
        table.add_row(
            escape(model["name"]),
            f"{model['weight']:g}",
            model["kind"],
            str(model["tensors"]),
            shown,
            bytes_in_words(model["bytes_to_read"]),
        )
    console.print(table)

    def say(line: str) -> None:
        console.print(line, markup=False)

    for key, value in plan["parameters"].items():
        say(f"{key}: {json.dumps(value, ensure_ascii=False)}")
    for name, origin in plan["plugins"].items():
        say(f"{name}: of {origin}")
    if plan["reason"] is not None:
        say(plan["reason"])
    if (metric := plan["metric"]) is not None:
        size = bytes_in_words(metric["bytes"])
        say(f"Metric: {metric['file']} ({size}); merged in {metric['use']}")
        if metric["unused_prompts"]:
            unused = ", ".join(metric["unused_prompts"])
            say(f"Note: its prompts of {unused} are of no model.")
    for note in plan["notes"]:
        say(f"Note: {note}")
    copied = plan["tensors_copied"]
    say(f"Tensors: {plan['tensors_merged']} merged, {copied} left as they are")
    if (passes := plan["passes_before"]) > 0:
        say(f"Passes over the models before the merge: {passes}")
    read, write = (bytes_in_words(plan[f"bytes_to_{verb}"]) for verb in ("read", "write"))
    say(f"Read: {read}; write: {write}")
    memory = bytes_in_words(plan["memory"])
    if plan["threads"] is None:
        say(f"Memory for tensors: a worker needs about {memory} for the largest")
    else:
        say(f"Memory for tensors: about {memory}; threads: {plan['threads']}")
    say(f"Output: {plan['output']} (nothing written)")
