"""An evaluation: a base, its fine-tunes and its merges, each asked the same rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starmerge.errors import StarmergeError, UsageError
from starmerge.evaluation.cache import Record, ScoreCache, score_key
from starmerge.evaluation.models.asking import Advance
from starmerge.evaluation.models.loading import device_kind, device_name, dtype_name
from starmerge.evaluation.scoring.comparison import (
    Difference,
    Interval,
    by_task,
    difference,
    normalised_average,
)
from starmerge.evaluation.scoring.metrics import Score
from starmerge.evaluation.settings import Settings
from starmerge.evaluation.sheets import AnyTask, Sheet, prepare
from starmerge.evaluation.subjects import BASE, Group, Update, check_backend, groups
from starmerge.progress import progress_bar


@dataclass(frozen=True)
class Evaluation:
    """Scores by model and task."""

    scorer: str
    mode: str
    scores: Mapping[str, Mapping[str, Score]]
    """By model, the base first, and task."""
    tuned: Mapping[str, Score]
    """By task, the score of its own fine-tune: the adapter or model called like the task."""

    @property
    def tasks(self) -> list[str]:
        """The tasks, in order."""
        return list(self.scores[BASE])

    @property
    def others(self) -> list[str]:
        """The models that are neither the base nor some task's own fine-tune."""
        return [name for name in self.scores if name != BASE and name not in self.tuned]

    def normalised(self, model: str) -> Interval | None:
        """Return a model's normalised average; None unless every task has its fine-tune."""
        return normalised_average(self.scores[model], self.tuned)

    def difference(self, first: str, second: str) -> Difference | None:
        """Return the paired difference of two models' normalised averages, first − second."""
        return difference(self.scores[first], self.scores[second], self.tuned)

    def by_task(self, first: str, second: str) -> dict[str, Difference]:
        """Return the paired difference of two models' scores on each task, first − second."""
        return by_task(self.scores[first], self.scores[second])

    def to_records(self) -> list[dict[str, Any]]:
        """Return a flat record for each score: ``pandas.DataFrame(evaluation.to_records())``."""
        return [
            {
                "model": model,
                "task": task,
                "scorer": self.scorer,
                "matching": self.mode,
                "metric": score.metric,
                "score": score.value,
                "low": score.low,
                "high": score.high,
                "n": score.n,
                "unparsed": score.unparsed,
                "shortened": score.shortened,
            }
            for model, scores in self.scores.items()
            for task, score in scores.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return all but the single predictions for a JSON file; intervals are of 95 %."""
        averages = {model: self.normalised(model) for model in (BASE, *self.others)}
        pairs = [(a, b) for n, a in enumerate(self.others) for b in self.others[:n]]
        return {
            "scorer": self.scorer,
            "matching": self.mode,
            "scores": self.to_records(),
            "normalised_averages": [
                {"model": model, "value": a.value, "low": a.low, "high": a.high}
                for model, a in averages.items()
                if a is not None
            ],
            "differences": [
                _comparison(model, other, None, found)
                for model, other in pairs
                if (found := self.difference(model, other)) is not None
            ],
            "differences_by_task": [
                _comparison(model, other, task, found)
                for model, other in pairs
                for task, found in self.by_task(model, other).items()
            ],
        }


def _comparison(model: str, other: str, task: str | None, found: Difference) -> dict[str, Any]:
    return {
        "model": model,
        "from": other,
        **({} if task is None else {"task": task}),
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
        "test": found.test,
        "n": found.n,
    }


def evaluate(
    base: str | Path,
    models: Mapping[str, str | Path | Update],
    tasks: Sequence[AnyTask],
    settings: Settings = Settings(),  # noqa: B008  (it is frozen)
    *,
    cache: ScoreCache | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score a base, adapters on it, updates of it and whole models on the same rows of some tasks.

    A model called like one of the tasks is that task's own fine-tune, the upper bound of the
    normalised average, and is asked that task only. Every other model is asked all tasks.

    The base is loaded once: adapters are switched on and off by PEFT, updates in memory are added
    to its weights and taken back. What the cache knows is not asked again.

    Args:
        base: The base: a folder or a Hub id.
        models: What is scored, by name: folders or Hub ids of adapters and whole models, updates
            of the base's tensors in memory.
        tasks: The tasks.
        settings: How they are asked.
        cache: Where answers are kept; None: nowhere.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: A model that cannot be found or loaded, a model called "base", two tasks of one
            name, a task without rows or without answers to rank, tasks of text and of images.
        StarmergeError: A model computes a NaN.
    """
    sheets = check(tasks, settings)
    subjects = groups(
        base,
        models,
        kind=next(iter(sheets.values())).kind,
        device=settings.device,
        dtype=settings.dtype,
        backend=settings.backend,
    )
    asked = {
        name: [sheet for task, sheet in sheets.items() if name == task or name not in sheets]
        for name in (BASE, *models)
    }
    scores: dict[str, dict[str, Score]] = {}
    total = sum(sheet.size for own in asked.values() for sheet in own)
    with progress_bar("evaluating", total, show=progress) as advance:
        while subjects:
            group = subjects.pop(0)  # what the one before has loaded goes with it
            gc.collect()  # models hold themselves in circles
            for name in group.names:
                found = answers(name, group, asked[name], settings, cache, advance)
                scores[name] = {
                    sheet.name: sheet.score(records)
                    for sheet, records in zip(asked[name], found, strict=True)
                }
    tuned = {name: scores[name][name] for name in models if name in sheets}
    return Evaluation(
        settings.scorer, settings.mode, {name: scores[name] for name in (BASE, *models)}, tuned
    )


def check(
    tasks: Sequence[AnyTask],
    settings: Settings,
    prepared: Callable[[AnyTask, Settings], Sheet] = prepare,
) -> dict[str, Sheet]:
    """Read the rows of tasks, and make sure that they can be asked together.

    Args:
        tasks: The tasks.
        settings: How they are asked.
        prepared: Reads the rows of a task; by default those to score.

    Raises:
        UsageError: Two tasks of one name, a task without rows or without answers to rank, tasks of
            text and of images, a backend or device that is not there.
    """
    names = [task.name for task in tasks]
    twice = [task for task in names if names.count(task) > 1]
    if twice:
        raise UsageError(f"Two tasks are called {twice[0]!r}. Evaluate them one after the other.")
    sheets = {task.name: prepared(task, settings) for task in tasks}
    if len({sheet.kind for sheet in sheets.values()}) != 1:
        raise UsageError("Give tasks, all of text or all of images: no model can do both.")
    check_backend(settings.backend, settings.device)
    return sheets


def answers(
    name: str,
    group: Group,
    sheets: Sequence[Sheet],
    settings: Settings,
    cache: ScoreCache | None,
    advance: Advance,
) -> list[list[Record]]:
    """Return what one model answers to some sheets: from the cache, or by asking it.

    Raises:
        UsageError: The model cannot be loaded, or the sheet does not fit it.
        StarmergeError: It computes a NaN.
    """
    found = []
    keys = [_key(name, group, sheet, settings) if cache is not None else None for sheet in sheets]
    with ExitStack() as stack:
        model = None
        for sheet, key in zip(sheets, keys, strict=True):
            records = cache.get(key) if cache is not None and key is not None else None
            if records is None:
                if model is None:
                    model = stack.enter_context(group.active(name))
                try:
                    records = sheet.ask(model, settings.batch_size, advance)
                except UsageError:
                    raise
                except StarmergeError as error:  # a NaN, for example: adapters bear the base's name
                    raise StarmergeError(f"Model {name}, task {sheet.name}: {error}") from error
                # What was rewritten while it was asked is kept under no key.
                if cache is not None and key and key == _key(name, group, sheet, settings):
                    cache.put(key, records)
            else:
                advance(sheet.size)
            found.append(records)
    return found


def _key(name: str, group: Group, sheet: Sheet, settings: Settings) -> str:
    """Return the key of a model's answers to a task."""
    folders = group.folders(name)
    device = device_kind(settings.device)
    return score_key(
        folders,
        {**sheet.asked, "backend": settings.backend},
        device=device_name(settings.device),
        dtype=dtype_name(folders[0], settings.dtype, device),
        update=group.update(name),
    )
