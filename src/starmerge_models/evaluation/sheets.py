"""A task made ready to be asked: one way to ask each kind, and to score what was answered.

What a model answers is kept as plain records, a row each, so that it can be stored and read anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal, Protocol

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.cache import Record
from starmerge_models.evaluation.models.asking import (
    Answer,
    LocalModel,
    ask,
    check_scorer,
    scored,
)
from starmerge_models.evaluation.models.classification import classify, predicted
from starmerge_models.evaluation.scoring.matching import MATCHERS, Matcher
from starmerge_models.evaluation.scoring.metrics import METRICS, Metric, Prediction, Score, score
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks.images import ImageTask, described
from starmerge_models.evaluation.tasks.lm_eval import HarnessTask
from starmerge_models.evaluation.tasks.sources import describe, split_sizes
from starmerge_models.evaluation.tasks.spare import Origin, spare_rows
from starmerge_models.evaluation.tasks.task import Example, Task
from starmerge_models.plugins import Registry
from starmerge_models.progress import Progress

AnyTask = Task | ImageTask | HarnessTask
"""Every kind of task that can be asked."""


class Sheet(Protocol):
    """A task with its rows, ready to be asked."""

    kind: Literal["text", "image"]
    """What kind of model can be asked."""

    @property
    def name(self) -> str:
        """The task's."""

    @property
    def size(self) -> int:
        """Number of rows."""

    @property
    def asked(self) -> dict[str, Any]:
        """Return all that decides what a model is asked, for a key of answers."""

    def record(self) -> dict[str, Any]:
        """Return which rows these are, for a record of what was asked."""

    def part(self, start: int, stop: int) -> Sheet:
        """Return a sheet of the rows from one number up to another, which it leaves out."""

    def ask(self, model: Any, batch_size: int | None, advance: Progress) -> list[Record]:
        """Ask a loaded model; return what it answers, a row each."""

    def score(self, records: Sequence[Record]) -> Score:
        """Score what a model answered."""


def prepare(task: AnyTask, settings: Settings) -> Sheet:
    """Read the rows of a task that are to be scored, and make it ready to be asked.

    Raises:
        UsageError: The rows cannot be had, or the scorer cannot score them.
    """
    if isinstance(task, HarnessTask):
        return _HarnessSheet(task, settings.rows)
    return _sheet_of(task, task.examples("test", settings.rows), settings)


def prepare_spare(task: AnyTask, settings: Settings) -> tuple[Sheet, Origin]:
    """Make a task ready to be asked on rows to choose by, which an evaluation does not score.

    See :func:`starmerge_models.evaluation.tasks.spare.spare_rows`. Tasks of lm-evaluation-harness
    have no others than those that are scored.

    Returns:
        The task with its rows, and where they come from.

    Raises:
        UsageError: The rows cannot be had, or the scorer cannot score them.
    """
    if isinstance(task, HarnessTask):
        return prepare(task, settings), "scored"
    rows, origin = spare_rows(task, settings.rows)
    return _sheet_of(task, rows, settings), origin


def _sheet_of(task: Task | ImageTask, examples: list[Example], settings: Settings) -> Sheet:
    if isinstance(task, Task):
        return _TextSheet(task, examples, settings)
    return _ImageSheet(task, examples)


def _plugin(registry: Registry[Any], thing: Matcher | Metric) -> dict[str, dict[str, str]]:
    """Return where a matcher or metric comes from, by its name; nothing if it is starmerge's."""
    origin = registry.origin(thing)
    return {} if origin is None else {thing.name: origin.record()}


class _TextSheet:
    kind: Literal["text", "image"] = "text"

    def __init__(self, task: Task, examples: list[Example], settings: Settings) -> None:
        check_scorer(settings.scorer, task, examples)
        self.name, self.size = task.name, len(examples)
        self._task, self._examples, self._settings = task, examples, settings

    @cached_property
    def asked(self) -> dict[str, Any]:
        return {
            "task": self._task.fingerprint(self._examples),
            "scorer": self._settings.scorer,
            # Read strictly, a response ends as soon as its reading is certain.
            "mode": self._settings.mode,
        }

    def record(self) -> dict[str, Any]:
        task = self._task
        held_out, training = split_sizes(task.source, task.name) or (None, None)
        return {
            "source": describe(task.source),
            "blake3": self.asked["task"],
            "rows": self.size,
            "held_out": held_out,
            "training": training,
            "match": task.read_by.name,
            "metric": task.scored_by.name,
            "plugins": {
                **_plugin(MATCHERS, task.read_by),
                **_plugin(METRICS, task.scored_by),
            },
        }

    def part(self, start: int, stop: int) -> _TextSheet:
        return _TextSheet(self._task, self._examples[start:stop], self._settings)

    def ask(self, model: Any, batch_size: int | None, advance: Progress) -> list[Record]:
        answers = ask(
            model,
            self._task,
            self._examples,
            self._settings.scorer,
            mode=self._settings.mode,
            batch_size=batch_size,
            advance=advance,
        )
        return [asdict(answer) for answer in answers]

    def score(self, records: Sequence[Record]) -> Score:
        answers = [Answer(**record) for record in records]
        return scored(
            self._task, self._examples, answers, self._settings.scorer, self._settings.mode
        )


class _ImageSheet:
    kind: Literal["text", "image"] = "image"

    def __init__(self, task: ImageTask, examples: list[Example]) -> None:
        self.name, self.size = task.name, len(examples)
        self._task, self._examples = task, examples

    @cached_property
    def asked(self) -> dict[str, Any]:
        return {"task": self._task.fingerprint(self._examples)}

    def record(self) -> dict[str, Any]:
        task = self._task
        return {
            "source": described(task.source),
            "blake3": self.asked["task"],
            "rows": self.size,
            "held_out": None,
            "training": None,
            "match": None,
            "metric": task.scored_by.name,
            "plugins": _plugin(METRICS, task.scored_by),
        }

    def part(self, start: int, stop: int) -> _ImageSheet:
        return _ImageSheet(self._task, self._examples[start:stop])

    def ask(self, model: Any, batch_size: int | None, advance: Progress) -> list[Record]:
        classifier, processor = model
        answers = classify(
            classifier,
            processor,
            self._task,
            self._examples,
            batch_size=batch_size,
            advance=advance,
        )
        return [{"response": answer.response} for answer in answers]

    def score(self, records: Sequence[Record]) -> Score:
        found = [
            predicted(example, record["response"])
            for example, record in zip(self._examples, records, strict=True)
        ]
        return score(found, self._task.scored_by, [words[0] for words in self._task.words])


class _HarnessSheet:
    kind: Literal["text", "image"] = "text"

    def __init__(self, task: HarnessTask, rows: int | None, skipped: int = 0) -> None:
        self.name, self._task, self._rows, self._skipped = task.name, task, rows, skipped
        self.size = task.size(rows) - skipped

    @cached_property
    def asked(self) -> dict[str, Any]:
        return {"task": self._task.fingerprint(self._rows, self._skipped)}

    def record(self) -> dict[str, Any]:
        return {
            "source": self.name,
            "blake3": self.asked["task"],
            "rows": self.size,
            "held_out": None,
            "training": None,
            "match": None,
            "metric": self._task.measure,
            "plugins": {},
        }

    def part(self, start: int, stop: int) -> _HarnessSheet:
        stop = min(stop, self.size)
        return _HarnessSheet(self._task, self._skipped + stop, self._skipped + start)

    def ask(self, model: Any, batch_size: int | None, advance: Progress) -> list[Record]:
        if not isinstance(model, LocalModel):
            raise UsageError(f"{self.name} is asked by its harness, on transformers alone.")
        answers = self._task.ask(
            model.model,
            model.tokenizer,
            rows=self._rows,
            skipped=self._skipped,
            batch_size=batch_size,
        )
        advance(self.size)
        return [asdict(answer) for answer in answers]

    def score(self, records: Sequence[Record]) -> Score:
        return self._task.score([Prediction(**record) for record in records])
