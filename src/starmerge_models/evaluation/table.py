"""An evaluation as a table that people read, in Markdown."""

from __future__ import annotations

import math

from starmerge_models.evaluation.evaluation import AVERAGE, Evaluation
from starmerge_models.evaluation.grids import aligned
from starmerge_models.evaluation.provenance import TaskRecord
from starmerge_models.evaluation.scoring.comparison import in_words
from starmerge_models.evaluation.subjects import BASE

LEGEND = (
    "Scores with their 95 % intervals; u = share of responses without a readable answer (they "
    "count as wrong)."
)


def markdown(evaluation: Evaluation) -> str:
    """Return the scores as a table; see :meth:`Evaluation.cells`."""
    *rows, last = evaluation.cells()
    if last[0] == AVERAGE:
        last = [f"**{cell}**" if cell else "" for cell in last]
    return aligned([*rows, last])


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
    if evaluation.provenance is not None:
        found += [
            note
            for task, record in evaluation.provenance.tasks.items()
            if (note := _split(task, record)) is not None
        ]
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


def _split(task: str, record: TaskRecord) -> str | None:
    """Say how many rows of a file were left out since they count as training rows."""
    if not record.training or record.held_out is None:
        return None
    others = "the others" if record.rows == record.held_out else f"{record.training} of the others"
    return (
        f"{task}: scored {record.rows} of {record.held_out + record.training} rows: {others} count "
        "as training rows (--all-rows scores all)."
    )
