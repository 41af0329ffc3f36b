"""The text that moments are taken of: written by the base, from a file, or prompts of a task."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from starmerge_models.calibration.text import Advance, Reading, Writer
from starmerge_models.checkpoints.hashing import cached_blake3_of
from starmerge_models.errors import UsageError
from starmerge_models.evaluation.tasks import find_task, task_of_prompts
from starmerge_models.evaluation.tasks.task import Task

_ROWS_OF = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """Text that moments are taken of."""

    task: str | None
    """Whose text; None: the text for all tasks."""
    written: int
    """Sequences that are written, and answers, for a progress bar."""
    tokens: int
    """Tokens of the encoder or of the decoder, at most: whichever reads more."""
    readings: Callable[[Advance], list[Reading]]
    """Returns what is read, having written what is missing."""
    record: Mapping[str, Any]
    """What the file says of it."""
    words: str
    """What people are told of it."""


def own_text(writer: Writer, sequences: int, length: int, seed: int) -> Source:
    """Return the text that the base writes by itself."""
    beginning = len(writer.beginning())
    if writer.kind == "encoder-decoder":
        each, words = length, f"of {length} tokens at most, and what it answers to each"
    else:
        each = beginning + length
        words = f"of {length} tokens"
        words += f" after {beginning}" if writer.kind == "causal" else " in place of masks"
    return Source(
        task=None,
        written=2 * sequences if writer.kind == "encoder-decoder" else sequences,
        tokens=sequences * each,
        readings=partial(writer.own, sequences),
        record={"kind": "self-written", "sequences": sequences, "length": length, "seed": seed},
        words=f"Text: {sequences} sequences that the base writes, {words}",
    )


def text_of_file(
    writer: Writer, file: Path, texts: Sequence[str], length: int | None, seed: int
) -> Source:
    """Return the text of a file."""
    readings = writer.texts(texts, length)
    record = {
        "kind": "texts",
        "file": file.name,
        "blake3": cached_blake3_of(file),
        "sequences": len(readings),
        "length": length,
        "seed": seed,
    }
    return _given(writer, readings, None, record, f"Text: {len(readings)} texts of {file}")


def prompts_of_task(writer: Writer, name: str, task: Task, rows: int, seed: int) -> Source:
    """Return the prompts of a task."""
    try:
        chosen = task.questions("train", rows)
    except UsageError as error:
        raise UsageError(
            f"{error} Or give prompts from a file: --prompts {name}=rows.jsonl."
        ) from error
    readings = writer.prompts(task, chosen)
    ids = json.dumps([reading.ids for reading in readings])
    record = {
        "source": task.where,
        "rows": len(readings),
        "blake3": blake3(ids.encode()).hexdigest(),
        "seed": seed,
    }
    return _given(writer, readings, name, record, f"Task {name}: {len(readings)} prompts")


def _given(
    writer: Writer, readings: list[Reading], task: str | None, record: dict[str, Any], words: str
) -> Source:
    """Return text that is there, to which only a decoder has to write."""
    answers = writer.length * len(readings) if writer.kind == "encoder-decoder" else 0
    tokens = max(answers, sum(len(reading.ids) for reading in readings))
    return Source(
        task=task,
        written=len(readings),
        tokens=tokens,
        readings=partial(writer.answered, readings),
        record=record,
        words=f"{words}, {tokens} tokens",
    )


def tasks_of(prompts: Mapping[str, str | Path | Task]) -> dict[str, Task]:
    """Find the tasks that are meant, by the names of their moments: those of the tasks alone.

    Raises:
        UsageError: There is none of a name, it is one of images, or two have one name.
    """
    tasks: dict[str, Task] = {}
    for name, what in prompts.items():
        short = name.rpartition("/")[2]
        if not short or short in tasks:
            fault = "are given twice" if short else "have no name"
            raise UsageError(f"Prompts {name}={what}: the moments {fault}. Choose another name.")
        found = what
        if not isinstance(found, Task) and Path(found).suffix.lower() in _ROWS_OF:
            found = task_of_prompts(name, Path(found))
        elif not isinstance(found, Task):
            found = find_task(str(found))  # type: ignore[assignment]
        if not isinstance(found, Task):
            raise UsageError(f"{what} is a task of images, which has no prompts.")
        tasks[short] = found
    return tasks
