"""``starmerge tasks``."""

from __future__ import annotations


def tasks() -> None:
    """List the tasks to fine-tune on and to evaluate.

    A path to a JSONL file or task folder stands wherever a task's name does.
    """
    from starmerge.evaluation.tasks import TASKS

    for name, task in sorted(TASKS.items()):
        answers = f"{len(task.labels)} labels" if task.labels else "open answers"
        print(f"{name:<12}{answers:<14}{task.source:<16}{task.instruction}")
