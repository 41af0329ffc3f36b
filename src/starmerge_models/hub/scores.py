"""Adds the scores of an evaluation to a model card, as Hub metadata and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starmerge_models.errors import UsageError

_TASK_TYPE = "text-generation"
"""The Hub's task type for language models."""


def with_scores(card: str, folder: Path, results: Path, *, name: str) -> str:
    """Return a card with the scores of a merge.

    The metadata has the scores under ``model-index``, for the Hub; a table has them with their 95 %
    intervals and the base's scores, for readers.

    Args:
        card: The card, in Markdown with metadata.
        folder: The folder of the merge.
        results: The folder of results, of ``starmerge evaluate -o``.
        name: The model's name in the metadata.

    Raises:
        UsageError: ``results`` is not a results folder, or has no model with the content of this
            merge.
        StarmergeError: The results are broken, or of another version.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData  # noqa: PLC0415  (slow to import)

    from starmerge_models.evaluation.model_groups import BASE  # noqa: PLC0415
    from starmerge_models.evaluation.results import read_scores  # noqa: PLC0415  (needs an extra)

    content = read_scores(results)
    model = _model_of(content, folder, results)
    scores = {
        who: {record["task"]: record for record in content["scores"] if record["model"] == who}
        for who in (BASE, model)
    }
    averages = {record["model"]: record for record in content.get("normalised_averages", ())}
    own = {task: record for task, record in scores[model].items() if record["score"] is not None}
    found = [
        EvalResult(
            task_type=_TASK_TYPE,
            dataset_type=task,
            dataset_name=task,
            metric_type=record["metric"],
            metric_value=record["score"],
        )
        for task, record in own.items()
    ]
    rows = [
        f"| {task} | {record['n']} | {record['metric']} | "
        f"{_cell(scores[BASE].get(task), 'score')} | {_cell(record, 'score')} |"
        for task, record in own.items()
    ]
    if model in averages:
        found.append(
            EvalResult(
                task_type=_TASK_TYPE,
                dataset_type=", ".join(own),
                dataset_name=f"{len(own)} tasks",
                metric_type="normalised_average",
                metric_value=averages[model]["value"],
                metric_name="Normalised average: 1 is each task's own fine-tune",
            )
        )
        rows.append(
            f"| **normalised average** | | | {_cell(averages.get(BASE), 'value')} | "
            f"{_cell(averages[model], 'value')} |"
        )
    section = (
        "## Scores\n\n"
        "By `starmerge evaluate`, with 95 % intervals.\n\n"
        "| task | n | metric | base | this model |\n|---|---|---|---|---|\n" + "\n".join(rows)
    )
    made = ModelCard(f"{card.rstrip()}\n\n{section}\n")
    assert isinstance(made.data, ModelCardData)  # for every model card
    made.data.model_name, made.data.eval_results = name, found
    return str(made)


def _model_of(content: Mapping[str, Any], folder: Path, results: Path) -> str:
    """Return the results' name of the merge in a folder, found by its content."""
    from starmerge_models.evaluation.cache import blake3_of_model  # noqa: PLC0415

    known = (content.get("provenance") or {}).get("models") or {}
    digest = blake3_of_model(folder)
    for name, record in known.items():
        if record["blake3"] == digest:
            return str(name)
    raise UsageError(
        f"{results} has scores of {', '.join(known) or 'no identifiable model'}, and none of them "
        f"has the content of {folder}. Evaluate this merge, and give its results."
    )


def _cell(record: Mapping[str, Any] | None, key: str) -> str:
    if record is None or record[key] is None:
        return "–"
    low, high = record.get("low"), record.get("high")
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{record[key]:.3f}{interval}"
