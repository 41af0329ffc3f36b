"""An evaluation as a table that people read, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from starmerge.evaluation.runner import Evaluation
from starmerge.evaluation.scoring.comparison import Interval, in_words
from starmerge.evaluation.scoring.metrics import DEFAULT, Score
from starmerge.evaluation.subjects import BASE

LEGEND = (
    "Scores with their 95 % intervals; u = share of responses without a readable answer (they "
    "count as wrong)."
)


def markdown(evaluation: Evaluation) -> str:
    """Return the scores as a table: a row for each task, a column for each model.

    The tasks' own fine-tunes share the column "fine-tuned". The last row has the normalised
    averages, if every task has a fine-tune.
    """
    columns: dict[str, dict[str, str]] = {}
    columns[BASE] = {task: _cell(score) for task, score in evaluation.scores[BASE].items()}
    if evaluation.tuned:
        columns["fine-tuned"] = {t: _cell(score) for t, score in evaluation.tuned.items()}
    for model in evaluation.others:
        columns[model] = {t: _cell(score) for t, score in evaluation.scores[model].items()}
    metrics = {task: score.metric for task, score in evaluation.scores[BASE].items()}
    is_plain = set(metrics.values()) == {DEFAULT}
    rows = [["task", "n", *columns]]
    for task, metric in metrics.items():
        n = evaluation.scores[BASE][task].n
        title = task if is_plain else f"{task} ({metric})"
        rows.append([title, str(n), *(cells.get(task, "") for cells in columns.values())])
    averages = {model: evaluation.normalised(model) for model in (BASE, *evaluation.others)}
    if any(averages.values()):
        cells = [interval_cell(averages[c]) if c in averages else "1" for c in columns]
        rows.append(["**normalised average**", "", *(f"**{cell}**" for cell in cells)])
    return aligned(rows)


def differences(evaluation: Evaluation) -> list[str]:
    """Return a sentence for each pair of merged models: which is better, if the rows can tell.

    One of the normalised averages, where there are such, and of the tasks that differ clearly.
    """
    sentences = []
    for number, first in enumerate(evaluation.others):
        for second in evaluation.others[:number]:
            found = evaluation.difference(first, second)
            overall = ""
            if found is not None:
                overall = f"Normalised average: {in_words(found, first, second)}"
            tasks = evaluation.by_task(first, second)
            clear = {task: one.value for task, one in tasks.items() if one.clear}
            several = ", ".join(f"{task} ({value:+.2f})" for task, value in clear.items())
            single = f"Task by task: {several or 'no clear difference'}."
            if found is None:
                single = f"{first} − {second}, task by task: {several or 'no clear difference'}."
            sentences.append(f"{overall} {single}".strip())
    return sentences


def notes(evaluation: Evaluation) -> list[str]:
    """Return what a reader must know of the scores beside their intervals."""
    found = []
    if evaluation.mode == "reference":
        found.append(
            "Matching: reference. Responses were read as the scripts of arXiv 2502.10339 read "
            "them, by the first substring, for comparison with published numbers; that rule finds "
            "answers that are none."
        )
    for model, scores in evaluation.scores.items():
        for task, score in scores.items():
            if score.shortened:
                found.append(
                    f"{model}, {task}: {score.shortened} of {score.n} prompts are longer than the "
                    "model's context; their passages lost their ends."
                )
            if math.isnan(score.value):
                found.append(
                    f"{model}, {task}: the {score.metric} of answers that are all alike is "
                    "undefined; it counts as 0 in a normalised average."
                )
    for model in (BASE, *evaluation.others):
        average = evaluation.normalised(model)
        if average is not None and average.high - average.low < 1e-9:
            found.append(
                f"{model}: all rows of a task were answered alike, so its normalised average has "
                "an interval without width. It says nothing of other rows."
            )
    return found


def report(evaluation: Evaluation) -> str:
    """Return the table with all that belongs under it, in Markdown."""
    return "\n\n".join([markdown(evaluation), LEGEND, *differences(evaluation), *notes(evaluation)])


def _cell(score: Score) -> str:
    if math.isnan(score.value):
        return "–"
    text = f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"
    return f"{text} u {score.unparsed:.0%}" if score.unparsed else text


def interval_cell(interval: Interval | None) -> str:
    """Return an average with its interval for people, "–" where there is none."""
    if interval is None:
        return "–"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first row its head, with columns of one width."""
    rows = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
