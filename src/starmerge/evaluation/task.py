"""What a task is: an instruction, rows with one right answer each, and how an answer is read.

A task is data plus two small functions (after inspect_ai's ``Task``): ``examples`` gives the rows,
``read`` finds the answer in what a model wrote. Tasks come from the registry
(:mod:`starmerge.evaluation.tasks`), from a JSONL file or from a folder.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from starmerge.errors import UsageError

Split = Literal["train", "test"]

DATA_SEED = 42
"""Seed of every row order and sample. Fixed: a task's rows are the same for every run and model."""

TEST_SHARE = 0.2
"""Share of the rows held out for testing, for tasks that come as one piece."""


@dataclass(frozen=True)
class Example:
    """One row: the ``input`` shown to the model, its right ``label``, the answers to rank."""

    input: str
    label: str
    choices: tuple[str, ...]
    """The candidate answers of likelihood ranking; contains ``label``."""


@dataclass(frozen=True)
class Task:
    """A task with held-out rows.

    Args:
        name: Its name in tables, and the name by which an adapter is matched to it.
        instruction: The sentence put before each input.
        rows: Yields all rows, in a fixed order, each once; given a generator seeded by the task.
        labels: The closed set of answers, or None when every row has its own.
        answer: For open answers, a regular expression of what counts as an answer at all.
        source: Where the rows come from.
        splits: Rows that come already split, instead of ``rows``.
    """

    name: str
    instruction: str
    rows: Callable[[random.Random], Iterator[Example]]
    labels: tuple[str, ...] | None
    source: str
    answer: str = r"\w+"
    splits: tuple[tuple[Example, ...], tuple[Example, ...]] | None = None

    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """Return the rows of a split, shuffled with :data:`DATA_SEED`, at most ``limit``.

        Whether a row is held out depends on a hash of its input alone, so that neither a new
        release of the package behind a task nor another limit can move a row between splits.

        Raises:
            UsageError: The task has no such rows.
        """
        if self.splits is not None:
            chosen = list(self.splits[0 if split == "train" else 1])
        else:
            unique = {row.input: row for row in self.rows(random.Random(DATA_SEED))}
            chosen = [row for row in unique.values() if (split == "test") == _held_out(row.input)]
        if not chosen:
            raise UsageError(
                f"Task {self.name} has too few rows: none are for {split}ing. Give more, or a "
                "folder with train.jsonl and test.jsonl."
            )
        random.Random(DATA_SEED).shuffle(chosen)
        return chosen[:limit]

    def read(self, response: str) -> str | None:
        """Return the answer that ``response`` gives, or None when it gives none.

        For a closed set of labels: the label that comes first in the response as a whole word,
        whatever its case; where two start at one place, the longer one. ("no" is not found in
        "know", nor "plausible" in "not plausible".) For open answers: the first match of
        ``answer``.
        """
        found = self._pattern.search(response)
        return found.group(0) if found else None

    def is_right(self, response: str, example: Example) -> bool:
        """Tell whether ``response`` is right.

        With a closed set of labels the answer read must be the label. With open answers the label
        must stand in the response as a whole word (the rule of arXiv 2502.10339, with whole words
        in place of substrings); 12 does not stand in 12.5, and 12,345 is 12345.
        """
        if self.labels is not None:
            answer = self.read(response)
            return answer is not None and _same(answer, example.label)
        return _whole_words((example.label,)).search(_without_separators(response)) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        if self.labels is not None:
            return _whole_words(self.labels)
        return re.compile(self.answer)


def load_path(path: Path) -> Task:
    """Read a task from a JSONL file, or from a folder with ``train.jsonl`` and ``test.jsonl``.

    Each line is ``{"input": ..., "label": ...}``; ``"choices": [...]`` where the answers to rank
    differ from row to row. Without choices, the labels that occur are the closed set of answers.
    A folder may hold the instruction in ``INSTRUCTION.txt``. A single file is split by a hash of
    the input, one row in five held out.

    Raises:
        UsageError: A missing file, a line that is not JSON, a row without input or label.
    """
    if path.is_dir():
        parts = [_read_rows(path / "train.jsonl"), _read_rows(path / "test.jsonl")]
        instruction = path / "INSTRUCTION.txt"
        text = instruction.read_text(encoding="utf-8").strip() if instruction.is_file() else ""
    else:
        parts, text = [_read_rows(path)], ""
    raw = [row for part in parts for row in part]
    open_answers = any("choices" in row for row in raw)
    labels = None if open_answers else tuple(sorted({str(row["label"]) for row in raw}))

    def example(row: dict[str, object]) -> Example:
        label = str(row["label"])
        choices = row.get("choices", labels)
        if not isinstance(choices, list | tuple) or label not in map(str, choices):
            raise UsageError(
                f"{path}: the row {row['input']!r} must list its label {label!r} in 'choices'."
            )
        return Example(str(row["input"]), label, tuple(map(str, choices)))

    examples = [tuple(example(row) for row in part) for part in parts]
    return Task(
        name=path.stem if path.is_file() else path.name,
        instruction=text,
        rows=lambda _: iter(examples[0]),
        labels=labels,
        source=path.name,
        splits=(examples[0], examples[1]) if len(examples) == 2 else None,
    )


def _read_rows(path: Path) -> list[dict[str, object]]:
    if not path.is_file():
        raise UsageError(f"{path} does not exist. A task folder holds train.jsonl and test.jsonl.")
    rows: list[dict[str, object]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict) or not {"input", "label"} <= row.keys():
                raise UsageError(
                    f"{path}, line {number}: a row is an object with 'input' and 'label'."
                )
            rows.append(row)
    if not rows:
        raise UsageError(f"{path} has no rows.")
    return rows


def _held_out(text: str) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64


def _same(first: str, second: str) -> bool:
    return first.casefold().split() == second.casefold().split()


def _without_separators(text: str) -> str:
    """Take the commas out of numbers written like 12,345."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _whole_words(words: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that finds the words, or numbers, as wholes, the longest first."""
    longest_first = sorted(words, key=len, reverse=True)
    alternatives = "|".join(r"\s+".join(map(re.escape, word.split())) for word in longest_first)
    return re.compile(rf"(?<!\w)(?<!\d[.,])(?:{alternatives})(?!\w)(?![.,]\d)", re.IGNORECASE)
