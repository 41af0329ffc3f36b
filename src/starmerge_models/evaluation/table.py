"""An evaluation as a Markdown table, with the sentences that explain it."""

from __future__ import annotations

import math

from starmerge_models.evaluation.evaluation import AVERAGE, Evaluation
from starmerge_models.evaluation.model_groups import BASE
from starmerge_models.evaluation.provenance import TaskRecord
from starmerge_models.evaluation.scoring.comparison import in_words
from starmerge_models.evaluation.text_tables import markdown_table

LEGEND = (
    "Scores with their 95 % intervals; u = share of responses without a readable answer (they "
    "count as wrong)."
)


def markdown(evaluation: Evaluation) -> str:
    """Return the scores as a table; see :meth:`Evaluation.cells`."""
    *rows, last = evaluation.cells()
    if last[0] == AVERAGE:
        last = [f"**{cell}**" if cell else "" for cell in last]
    return markdown_table([*rows, last])


def differences(evaluation: Evaluation) -> list[str]:
    """Return a sentence for each pair of merged models: which is better, or no clear difference.

    It covers the normalised averages, where defined, and the tasks with a clear difference.
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
    """Return the caveats that a reader of the scores needs."""
    found = []
    if evaluation.mode == "reference":
        found.append(
            "Matching: reference. Responses were parsed like in the scripts of arXiv 2502.10339, "
            "by the first substring, for comparison with published numbers; that rule also finds "
            "answers that the model did not give."
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
                    "model's context; their passages were truncated."
                )
            if math.isnan(score.value):
                found.append(
                    f"{model}, {task}: the {score.metric} of identical answers is "
                    "undefined; it counts as 0 in a normalised average."
                )
    for model in (BASE, *evaluation.others):
        average = evaluation.normalised(model)
        if average is not None and average.high - average.low < 1e-9:
            found.append(
                f"{model}: all rows of each task have the same score, so the interval of its "
                "normalised average has no width. It says nothing about other rows."
            )
    return found


def report(evaluation: Evaluation) -> str:
    """Return the table with legend, differences and caveats, in Markdown."""
    return "\n\n".join([markdown(evaluation), LEGEND, *differences(evaluation), *notes(evaluation)])


def _split(task: str, record: TaskRecord) -> str | None:
    """Return a sentence on the rows of a file left out because they count as training rows."""
    if not record.training or record.held_out is None:
        return None
    others = "the others" if record.rows == record.held_out else f"{record.training} of the others"
    return (
        f"{task}: scored {record.rows} of {record.held_out + record.training} rows: {others} count "
        "as training rows (--all-rows scores all)."
    )
