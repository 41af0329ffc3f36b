"""Rows for selecting a merge: rows of a task that an evaluation does not score, if any."""

from __future__ import annotations

from typing import Literal

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.tasks.images import ImageTask
from starmerge_models.evaluation.tasks.sources import Sample
from starmerge_models.evaluation.tasks.task import Example, Task

Origin = Literal["held out", "training", "scored"]
"""Origin of rows: held out but not in the task's sample; trained on; scored."""


def selection_rows(task: Task | ImageTask, limit: int | None) -> tuple[list[Example], Origin]:
    """Return rows of a task that an evaluation of it does not score.

    Scores of a merge are biased upwards on the rows that it was selected by. So the function
    tries, in this order:

    - held-out rows outside the task's sample: neither trained on nor scored;
    - training rows: not scored, but the fine-tune may have memorised them;
    - the scored rows.

    It returns the first of these that has as many rows as the task's own sample, and, for a
    balanced sample, rows of the same labels.

    Args:
        task: The task.
        limit: Most rows; None: as many as the task's sample has.

    Returns:
        The rows, shuffled with the sample's seed, and their origin.

    Raises:
        UsageError: The task has no rows to score.
    """
    scored = task.examples("test")
    everything = task.model_copy(update={"sample": Sample(seed=task.sample.seed)})
    known = {row.id for row in scored}
    pools: dict[Origin, list[Example]] = {
        "held out": [row for row in everything.examples("test") if row.id not in known],
        "training": _training_rows(task),
        "scored": scored,
    }
    samples = {
        origin: task.sample.take(rows, lambda row: row.label, limit)
        for origin, rows in pools.items()
        if rows
    }
    wanted = samples["scored"]

    def is_enough(rows: list[Example]) -> bool:
        is_balanced = task.sample.kind != "balanced" or _labels(rows) >= _labels(wanted)
        return len(rows) >= len(wanted) and is_balanced

    origin = next(origin for origin, rows in samples.items() if is_enough(rows))
    return samples[origin], origin


def _training_rows(task: Task | ImageTask) -> list[Example]:
    """Return the training rows; an empty list where the task has none."""
    try:
        return task.examples("train")
    except UsageError:
        return []


def _labels(rows: list[Example]) -> set[str]:
    return {row.label for row in rows}
