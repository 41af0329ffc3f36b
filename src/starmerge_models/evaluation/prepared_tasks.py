"""Prepared tasks: tasks with their rows, behind one protocol for text, images and lm-eval.

A model's responses are plain records, one for each row, which the cache can store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal, Protocol

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.cache import Record
from starmerge_models.evaluation.models.classification import classify, predicted
from starmerge_models.evaluation.models.scorers import (
    Answer,
    LocalModel,
    check_scorer,
    run_scorer,
    score_answers,
)
from starmerge_models.evaluation.scoring.matching import MATCHERS, Matcher
from starmerge_models.evaluation.scoring.metrics import METRICS, Metric, Prediction, Score, score
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks.images import ImageTask, describe_images
from starmerge_models.evaluation.tasks.lm_eval import HarnessTask
from starmerge_models.evaluation.tasks.selection import Origin, selection_rows
from starmerge_models.evaluation.tasks.sources import describe, split_sizes
from starmerge_models.evaluation.tasks.task import Example, Task
from starmerge_models.plugins import Registry
from starmerge_models.progress import Progress

AnyTask = Task | ImageTask | HarnessTask
"""Every kind of task that a model can be evaluated on."""


class PreparedTask(Protocol):
    """A task together with its rows, ready for evaluation."""

    kind: Literal["text", "image"]
    """The kind of model that the task needs."""

    @property
    def name(self) -> str:
        """The task's name."""

    @property
    def size(self) -> int:
        """Number of rows."""

    @property
    def key_fields(self) -> dict[str, Any]:
        """Return everything that determines the prompts, as part of a cache key."""

    def record(self) -> dict[str, Any]:
        """Return the provenance of the rows, the fields of a ``TaskRecord``."""

    def part(self, start: int, stop: int) -> PreparedTask:
        """Return the prepared task with the rows ``start`` to ``stop`` (exclusive) alone."""

    def run(self, model: Any, batch_size: int | None, advance: Progress) -> list[Record]:
        """Evaluate a loaded model on the rows; return its responses, one record for each row."""

    def score(self, records: Sequence[Record]) -> Score:
        """Score the records of one model."""


def prepare(task: AnyTask, settings: Settings) -> PreparedTask:
    """Read the rows of a task that an evaluation scores.

    Raises:
        UsageError: The rows cannot be had, or the scorer cannot score them.
    """
    if isinstance(task, HarnessTask):
        return _PreparedHarnessTask(task, settings.rows)
    return _prepared(task, task.examples("test", settings.rows), settings)


def prepare_for_selection(task: AnyTask, settings: Settings) -> tuple[PreparedTask, Origin]:
    """Read rows of a task to select a merge by, which an evaluation does not score.

    See :func:`starmerge_models.evaluation.tasks.selection.selection_rows`. A task of
    lm-evaluation-harness has only the rows that an evaluation scores.

    Returns:
        The task with its rows, and where they come from.

    Raises:
        UsageError: The rows cannot be had, or the scorer cannot score them.
    """
    if isinstance(task, HarnessTask):
        return prepare(task, settings), "scored"
    rows, origin = selection_rows(task, settings.rows)
    return _prepared(task, rows, settings), origin


def _prepared(task: Task | ImageTask, examples: list[Example], settings: Settings) -> PreparedTask:
    if isinstance(task, Task):
        return _PreparedText(task, examples, settings)
    return _PreparedImages(task, examples)


def _plugin(registry: Registry[Any], thing: Matcher | Metric) -> dict[str, dict[str, str]]:
    """Return the origin of a plug-in matcher or metric by its name; {} for starmerge's own."""
    origin = registry.origin(thing)
    return {} if origin is None else {thing.name: origin.record()}


class _PreparedText:
    kind: Literal["text", "image"] = "text"

    def __init__(self, task: Task, examples: list[Example], settings: Settings) -> None:
        check_scorer(settings.scorer, task, examples)
        self.name, self.size = task.name, len(examples)
        self._task, self._examples, self._settings = task, examples, settings

    @cached_property
    def key_fields(self) -> dict[str, Any]:
        return {
            "task": self._task.fingerprint(self._examples),
            "scorer": self._settings.scorer,
            # In strict mode, generation stops as soon as the parsed answer is certain.
            "mode": self._settings.mode,
        }

    def record(self) -> dict[str, Any]:
        task = self._task
        held_out, training = split_sizes(task.source, task.name) or (None, None)
        return {
            "source": describe(task.source),
            "blake3": self.key_fields["task"],
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

    def part(self, start: int, stop: int) -> _PreparedText:
        return _PreparedText(self._task, self._examples[start:stop], self._settings)

    def run(self, model: Any, batch_size: int | None, advance: Progress) -> list[Record]:
        answers = run_scorer(
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
        return score_answers(
            self._task, self._examples, answers, self._settings.scorer, self._settings.mode
        )


class _PreparedImages:
    kind: Literal["text", "image"] = "image"

    def __init__(self, task: ImageTask, examples: list[Example]) -> None:
        self.name, self.size = task.name, len(examples)
        self._task, self._examples = task, examples

    @cached_property
    def key_fields(self) -> dict[str, Any]:
        return {"task": self._task.fingerprint(self._examples)}

    def record(self) -> dict[str, Any]:
        task = self._task
        return {
            "source": describe_images(task.source),
            "blake3": self.key_fields["task"],
            "rows": self.size,
            "held_out": None,
            "training": None,
            "match": None,
            "metric": task.scored_by.name,
            "plugins": _plugin(METRICS, task.scored_by),
        }

    def part(self, start: int, stop: int) -> _PreparedImages:
        return _PreparedImages(self._task, self._examples[start:stop])

    def run(self, model: Any, batch_size: int | None, advance: Progress) -> list[Record]:
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


class _PreparedHarnessTask:
    kind: Literal["text", "image"] = "text"

    def __init__(self, task: HarnessTask, rows: int | None, skipped: int = 0) -> None:
        self.name, self._task, self._rows, self._skipped = task.name, task, rows, skipped
        self.size = task.size(rows) - skipped

    @cached_property
    def key_fields(self) -> dict[str, Any]:
        return {"task": self._task.fingerprint(self._rows, self._skipped)}

    def record(self) -> dict[str, Any]:
        return {
            "source": self.name,
            "blake3": self.key_fields["task"],
            "rows": self.size,
            "held_out": None,
            "training": None,
            "match": None,
            "metric": self._task.measure,
            "plugins": {},
        }

    def part(self, start: int, stop: int) -> _PreparedHarnessTask:
        stop = min(stop, self.size)
        return _PreparedHarnessTask(self._task, self._skipped + stop, self._skipped + start)

    def run(self, model: Any, batch_size: int | None, advance: Progress) -> list[Record]:
        if not isinstance(model, LocalModel):
            raise UsageError(
                f"{self.name} runs in lm-evaluation-harness, which needs the backend transformers. "
                "Leave --backend out."
            )
        answers = self._task.run(
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
