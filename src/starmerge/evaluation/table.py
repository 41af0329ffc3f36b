"""An evaluation as a table that people read, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from starmerge.evaluation.metrics import Interval, Score
from starmerge.evaluation.runner import BASE, Evaluation

LEGEND = (
    "Accuracy with its 95 % interval; u = share of responses without a readable answer "
    "(they count as wrong)."
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
    rows = [["task", "n", *columns]]
    for task in evaluation.tasks:
        n = evaluation.scores[BASE][task].n
        rows.append([task, str(n), *(cells.get(task, "") for cells in columns.values())])
    averages = {model: evaluation.normalised(model) for model in (BASE, *evaluation.others)}
    if any(averages.values()):
        cells = [_interval(averages[c]) if c in averages else "1" for c in columns]
        rows.append(["**normalised average**", "", *(f"**{cell}**" for cell in cells)])
    return _aligned(rows)


def differences(evaluation: Evaluation) -> list[str]:
    """Return a sentence for each pair of merged models, with the paired interval."""
    sentences = []
    for number, first in enumerate(evaluation.others):
        for second in evaluation.others[:number]:
            interval = evaluation.difference(first, second)
            if interval is not None:
                verdict = "" if interval.low * interval.high > 0 else ", no clear difference"
                sentences.append(
                    f"{first} − {second}: {interval.value:+.3f} normalised average, paired 95 % "
                    f"interval [{interval.low:+.3f}, {interval.high:+.3f}]{verdict}."
                )
    return sentences


def _cell(score: Score) -> str:
    text = f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"
    return f"{text} u {score.unparsed:.0%}" if score.unparsed else text


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
