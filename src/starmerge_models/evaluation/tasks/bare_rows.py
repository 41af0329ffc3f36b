"""Tasks made from bare rows: a file of inputs and labels without a task file, or a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from starmerge_models.errors import UsageError, explain, nearest
from starmerge_models.evaluation.tasks.sources import (
    FileSource,
    missing_marker,
    read_named,
    text_of,
)
from starmerge_models.evaluation.tasks.task import Task
from starmerge_models.reading import read_text

HELD_OUT = 0.2
"""Share of a bare file of rows that is held out for testing."""

COLUMNS = ("input", "label", "choices")
"""The columns of bare rows; ``choices`` may be missing."""


def task_of_rows(path: Path, columns: Mapping[str, str] | None = None) -> Task:
    """Make a task from a file of rows, or from a folder with ``train.jsonl`` and ``test.jsonl``.

    Each row has ``input`` and ``label``, and ``choices``, a list, where the answers to rank differ
    between rows. Without choices, the labels that occur are the closed set of answers. A folder
    may have an instruction in ``INSTRUCTION.txt``, which is prepended to each input. In a single
    file one row in five is held out for scoring, chosen by a hash of the input.

    Args:
        path: The file or the folder.
        columns: Maps these columns to the file's own names: ``{"input": "text"}``.

    Raises:
        UsageError: A file is missing, a line is broken, a row lacks an input or label or has an
            empty one, or there are fewer than two labels.
    """
    names = dict(columns or {})
    for name in names:
        if name not in COLUMNS:
            raise UsageError(
                f"--columns {name}=…: rows have input, label and choices.{nearest(name, COLUMNS)}"
            )
    instruction = path / "INSTRUCTION.txt"
    if path.is_dir():
        test, train = path / "test.jsonl", path / "train.jsonl"
        source, files = FileSource(file=test, train_file=train, columns=names), [train, test]
    else:
        source, files = FileSource(file=path, held_out=HELD_OUT, columns=names), [path]
    labels: dict[str, int] = {}
    is_open = False
    for where, row in _rows(files, names):
        _check_row(row, where, names)
        label = text_of(row["label"])
        labels[label] = labels.get(label, 0) + 1
        is_open |= "choices" in row
    if len(labels) == 1 and not is_open:
        ((label, count),) = labels.items()
        raise UsageError(
            f"{path}: all {count} rows have the label {label!r}, so there is nothing to classify. "
            "Add rows of another label, or a column 'choices' with the answers to rank; or name "
            "the labels in a task file."
        )
    text = read_text(instruction).strip() if instruction.is_file() else ""
    head = text.replace("{", "{{").replace("}", "}}") + "\n" if text else ""
    try:
        return Task(
            name=path.name if path.is_dir() else path.stem,
            source=source,
            prompt=head + "{input}",
            labels=None if is_open else {label: (label,) for label in sorted(labels)},
            choices="choices" if is_open else None,
        )
    except ValidationError as error:
        raise UsageError(f"{path}: {explain(error, Task.model_fields)}") from error


def _rows(files: list[Path], names: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of files, each with its name for error messages."""
    for file in files:
        for number, row in enumerate(read_named(file, names), start=1):
            yield f"{file}, row {number}", row


def _check_row(row: Mapping[str, Any], where: str, names: Mapping[str, str]) -> None:
    """Make sure that a row has an input and a label.

    Raises:
        UsageError: It lacks one, or one is empty.
    """
    lacking = [name for name in ("input", "label") if name not in row]
    if lacking:
        others = [column for column in row if column not in (*COLUMNS, *names.values())]
        guess = ",".join(
            f"{name}={column}"
            for name, column in zip(lacking, [*others, "COLUMN", "COLUMN"], strict=False)
        )
        raise UsageError(
            f"{where}: a row has 'input' and 'label', and this one has "
            f"{', '.join(map(repr, row)) or 'no columns'}. If other columns hold them, name these: "
            f"--columns {guess}"
        )
    for name in ("input", "label"):
        what = missing_marker(row[name]) or ("" if text_of(row[name]).strip() else "no text")
        if what:
            raise UsageError(
                f"{where}: {names.get(name, name)!r} is empty ({what}). Fill it in, or leave the "
                "row out."
            )
