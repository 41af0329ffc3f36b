"""Scores in the layout of the scripts of arXiv 2502.10339: a JSON file for each method.

Each file holds ``{task: score}`` and is in a folder for its set of tasks, so that the files of a
folder are comparable. As in https://github.com/IBM/STAR, ``pretrained.json`` is the base and
``lora.json`` the fine-tunes, each on its own task; every other model has a file of its own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from blake3 import blake3

from starmerge_models.checkpoints.writer import json_bytes
from starmerge_models.errors import UsageError
from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.model_groups import BASE
from starmerge_models.evaluation.results import without_nan
from starmerge_models.evaluation.scoring.metrics import Score
from starmerge_models.storage.publishing import check_output_file, output_file

_PRETRAINED, _TUNED = "pretrained", "lora"

_LONGEST = 200
"""Longest folder name in bytes; file systems allow 255."""


def task_set(tasks: Iterable[str]) -> str:
    """Return the name of the folder for a set of tasks: their names, sorted and joined by ``_``.

    Of many tasks, their number and a hash of their names.
    """
    names = sorted(tasks)
    joined = "_".join(names).replace("/", "-")
    if len(joined.encode()) <= _LONGEST:
        return joined
    return f"{len(names)}_tasks_{blake3(joined.encode()).hexdigest()[:8]}"


def check_flat(
    folder: Path, models: Iterable[str], tasks: Sequence[str], *, overwrite: bool
) -> None:
    """Make sure that the files may be written; the caller must check before it runs models.

    Args:
        folder: The output folder.
        models: The names of all models but the base.
        tasks: The names of the tasks.
        overwrite: Whether to replace existing files.

    Raises:
        UsageError: A model's name cannot be a file name, or a file exists already.
    """
    others = [name for name in models if name not in tasks]
    for name in others:
        if name in (_PRETRAINED, _TUNED) or "/" in name or name.startswith("."):
            raise UsageError(
                f"A model is called {name!r}, and {name}.json cannot be its file: "
                f"{_PRETRAINED}.json is the base's, {_TUNED}.json the fine-tunes'. Give it another "
                "name, NAME=PATH."
            )
    tuned = [_TUNED] if any(name in tasks for name in models) else []
    for name in (_PRETRAINED, *tuned, *others):
        check_output_file(folder / task_set(tasks) / f"{name}.json", overwrite=overwrite)


def write_flat(folder: Path, evaluation: Evaluation, *, overwrite: bool = False) -> Path:
    """Write the scores, each file atomically; files of other methods are kept.

    Scores are rounded to four decimals, as by the scripts; an undefined score is null.

    Args:
        folder: The output folder.
        evaluation: The scores.
        overwrite: Whether to replace existing files.

    Returns:
        The folder of the set of tasks.

    Raises:
        UsageError: As :func:`check_flat`.
        StarmergeError: The disk is full, or fails otherwise.
    """
    others = {name: evaluation.scores[name] for name in evaluation.others}
    check_flat(folder, [*evaluation.tuned, *others], evaluation.tasks, overwrite=overwrite)
    files = {_PRETRAINED: evaluation.scores[BASE], **others}
    if evaluation.tuned:
        files[_TUNED] = evaluation.tuned
    place = folder / task_set(evaluation.tasks)
    for name, scores in files.items():
        with output_file(place / f"{name}.json", overwrite=overwrite) as file:
            file.write_bytes(json_bytes({task: _rounded(scores[task]) for task in scores}))
    return place


def _rounded(score: Score) -> float | None:
    value: float | None = without_nan(round(score.value, 4))
    return value
