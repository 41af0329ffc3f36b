"""The runs of a study as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from starmerge_models.evaluation.model_groups import BASE, TUNED
from starmerge_models.evaluation.text_tables import interval_cell, markdown_table
from starmerge_models.study.averages import SPLITS, Averages, RunAverage
from starmerge_models.study.grids import GridBest, best_of_grids
from starmerge_models.study.store import Store

BOLD_LEGEND = "Bold: the highest value of its column."

LEGEND = (
    "Normalised averages (mean over the tasks of score/fine-tune's score) with their 95 % "
    "intervals over rows; n models merged, the mean over the combinations. All runs answered the "
    "same rows, so averages with overlapping intervals may still differ clearly."
)

FEWER_LEGEND = (
    "\\*: on fewer combinations than others of the column, as runs failed or are missing. Not "
    "comparable."
)

GRID_LEGEND = (
    "The best of a grid was selected on the rows that it is scored on, so its score is biased "
    "upwards; held out: selected on half of the rows, scored on the other half, the mean over "
    f"{SPLITS} random splits."
)


def markdown(averages: Averages) -> str:
    """Return the normalised averages: a row for each chain, a column for each number of models.

    A value on fewer combinations than others of its column gets an asterisk and is never bold.
    """
    numbers = sorted({run.n for run in averages.runs})
    by_number = {n: [run for run in averages.runs if run.n == n] for n in numbers}
    counts = [_combinations(by_number[n]) for n in numbers]
    head = [
        f"n = {n}" + (f" ({count} combinations)" if count > 1 else "")
        for n, count in zip(numbers, counts, strict=True)
    ]
    rows = [["method", *head]]
    rows.append([f"*{BASE}*", *(interval_cell(averages.base_mean(by_number[n])) for n in numbers)])
    cells = {
        label: [[run for run in by_number[n] if run.label == label] for n in numbers]
        for label in averages.labels
    }
    best = [
        max(
            (averages.mean(row[k]).value for row in cells.values() if _combinations(row[k]) == own),
            default=math.nan,
        )
        for k, own in enumerate(counts)
    ]
    is_partial = False
    for label, row in cells.items():
        texts = []
        for runs, top, count in zip(row, best, counts, strict=True):
            mean = averages.mean(runs) if runs else None
            text = interval_cell(mean)
            if runs and _combinations(runs) < count:
                text, is_partial = f"{text} \\*", True
            elif mean is not None and mean.value == top:
                text = f"**{text}**"
            texts.append(text)
        rows.append([label, *texts])
    return "\n\n".join(
        [markdown_table(rows), f"{LEGEND} {BOLD_LEGEND}", *([FEWER_LEGEND] if is_partial else [])]
    )


def by_task(averages: Averages) -> str:
    """Return the scores of the merges with the most models, a column for each task."""
    most = max(run.n for run in averages.runs)
    runs = [run for run in averages.runs if run.n == most]
    labels = list(dict.fromkeys(run.label for run in runs))
    tasks = list(dict.fromkeys(task for run in runs for task in run.record.run.tasks))
    rows = [["method", *tasks]]
    rows.append([f"*{BASE}*", *(_score(averages.base_score(task)) for task in tasks)])
    rows.append([f"*{TUNED}*", *(_score(averages.tuned_score(task)) for task in tasks)])
    for label in labels:
        own = [run for run in runs if run.label == label]
        rows.append([label, *(_score(_mean_score(own, task)) for task in tasks)])
    return f"Scores, n = {most}:\n\n{markdown_table(rows)}"


def grids(found: Sequence[GridBest]) -> str:
    """Return the best points of grids and the defaults, a row for each chain and number."""
    rows = [["method", "n", "points", "default", "best of the grid", "held out", "best − default"]]
    for grid in found:
        gain = grid.gain
        rows.append(
            [
                grid.method,
                str(grid.n),
                str(grid.points),
                interval_cell(grid.default),
                f"{interval_cell(grid.best)} {grid.best_label.partition(':')[2]}".strip(),
                "–" if math.isnan(grid.held_out) else f"{grid.held_out:.3f}",
                "" if gain is None else f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
            ]
        )
    return f"{markdown_table(rows)}\n\n{GRID_LEGEND}"


def report(averages: Averages) -> str:
    """Return all tables of a store with their legends and notes, in Markdown."""
    parts = [heading(averages.store), markdown(averages)]
    found = [grid for grid in best_of_grids(averages) if grid.points > 1]
    if found:
        parts.append(grids(found))
    parts.append(by_task(averages))
    parts += left_out(averages)
    parts += failures(averages.store)
    return "\n\n".join(parts)


def heading(store: Store) -> str:
    """Return a line with the study's name, pool, rows, scorer and progress."""
    head = store.head
    rows = sorted({task["rows"] for task in head["tasks"].values()})
    asked = f"{rows[0]} rows" if len(rows) == 1 else f"{rows[0]} to {rows[-1]} rows"
    text = (
        f"**{head['study']['name']}**: {len(head['models'])} fine-tunes of {head['base']['name']}, "
        f"{asked} a task, {head['asked']['scorer']}."
    )
    planned = head.get("planned", 0)
    if len(store.records) < planned:
        text += f" {len(store.records)} of {planned} runs are done: the same command continues."
    return text


def left_out(averages: Averages) -> list[str]:
    """Return a sentence on merges without a normalised average, and the tasks that cause it."""
    if not averages.left_out:
        return []
    merges = len(averages.left_out) + len(averages.runs)
    tasks = dict.fromkeys(task for record in averages.left_out for task in record.run.tasks)
    names = ", ".join(task for task in tasks if not averages.tuned_score(task) > 0)
    return [
        f"{len(averages.left_out)} of {merges} merges are left out: no fine-tune has a score above "
        f"0 on {names}."
    ]


def failures(store: Store) -> list[str]:
    """Return the number of failed runs and their errors, each error once."""
    failed = store.failures
    if not failed:
        return []
    reasons: dict[str, list[str]] = {}
    for record in failed:
        run = record.run
        name = f"{run.label} {run.models[0]}" if run.kind == "fine-tune" else run.label
        reasons.setdefault(str(record.error), []).append(name)
    lines = [f"{len(failed)} of {len(store.records)} runs failed (--retry repeats them):"]
    for reason, labels in reasons.items():
        names = ", ".join(dict.fromkeys(labels))
        times = f" ({len(labels)} runs)" if len(labels) > 1 else ""
        lines.append(f"- {names}{times}: {reason}")
    return ["\n".join(lines)]


def _combinations(runs: Sequence[RunAverage]) -> int:
    return len({run.record.run.models for run in runs})


def _score(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _mean_score(runs: Sequence[RunAverage], task: str) -> float:
    lines = [run.record.by_task[task] for run in runs if task in run.record.by_task]
    scores = [math.nan if line["score"] is None else line["score"] for line in lines]
    return float(np.mean(scores)) if scores else math.nan
