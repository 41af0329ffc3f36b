"""Scores in the layout of the scripts of arXiv 2502.10339: a JSON file for each method.

Each holds ``{task: score}`` and lies in a folder for its set of tasks, so that files of one folder
can be compared. The base is ``pretrained.json`` and the fine-tunes, each on its own task,
``lora.json``, as in https://github.com/IBM/STAR; every other model has the file of its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from blake3 import blake3

from starmerge_models.checkpoints.writer import json_bytes
from starmerge_models.errors import UsageError
from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.results import without_nan
from starmerge_models.evaluation.scoring.metrics import Score
from starmerge_models.evaluation.subjects import BASE
from starmerge_models.storage.publishing import check_output_file, output_file

_PRETRAINED, _TUNED = "pretrained", "lora"

_LONGEST = 200
"""Characters of a folder's name; file systems allow 255 bytes."""


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
    """Make sure that the files may be written: to be called before models are asked.

    Args:
        folder: Where to.
        models: The names of all models but the base.
        tasks: The names of the tasks.
        overwrite: Replace files that stand there.

    Raises:
        UsageError: A model has a name that no file can have, or a file stands there.
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
    """Write the scores, each file whole or not at all; files of other methods stay.

    Scores are rounded to four decimals, as by the scripts; null where one is undefined.

    Args:
        folder: Where to.
        evaluation: What to write.
        overwrite: Replace files that stand there.

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
