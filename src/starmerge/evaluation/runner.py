"""An evaluation: a base, its fine-tunes and its merges, each asked the same held-out rows."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starmerge.checkpoints.source import resolve
from starmerge.errors import UsageError
from starmerge.evaluation.metrics import (
    Interval,
    Score,
    accuracy,
    difference,
    normalised_average,
)
from starmerge.evaluation.models import AdapterSwitch, load_model
from starmerge.evaluation.scoring import SCORERS
from starmerge.evaluation.task import Example, Task
from starmerge.progress import progress_bar

BASE = "base"
"""Name of the base in every evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """Scores by model and task."""

    scorer: str
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

    def difference(self, first: str, second: str) -> Interval | None:
        """Return the paired difference of two models' normalised averages, first − second."""
        return difference(self.scores[first], self.scores[second], self.tuned)

    def to_records(self) -> list[dict[str, Any]]:
        """Return a flat record for each score: ``pandas.DataFrame(evaluation.to_records())``."""
        return [
            {
                "model": model,
                "task": task,
                "scorer": self.scorer,
                "accuracy": score.value,
                "low": score.low,
                "high": score.high,
                "n": score.n,
                "unparsed": score.unparsed,
            }
            for model, scores in self.scores.items()
            for task, score in scores.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return everything for a JSON file; intervals are of 95 %."""
        models = [BASE, *self.others]
        averages = {model: self.normalised(model) for model in models}
        return {
            "scorer": self.scorer,
            "scores": self.to_records(),
            "normalised_averages": [
                {"model": model, "value": a.value, "low": a.low, "high": a.high}
                for model, a in averages.items()
                if a is not None
            ],
            "differences": [
                {"model": model, "from": other, "value": d.value, "low": d.low, "high": d.high}
                for model in self.others
                for other in self.others
                if model != other and (d := self.difference(model, other)) is not None
            ],
        }


def evaluate(
    base: str | Path,
    models: Mapping[str, str | Path],
    tasks: Sequence[Task],
    *,
    scorer: str = "generate",
    rows: int = 200,
    progress: bool = False,
) -> Evaluation:
    """Score a base, adapters on it and whole models on the same rows of some tasks.

    A model called like one of the tasks is that task's own fine-tune, the upper bound of the
    normalised average, and is asked that task only. Every other model is asked all tasks.

    Args:
        base: The base: a folder or a Hub id.
        models: Adapters (applied by PEFT, sharing the base's weights) and whole models by name.
        tasks: The tasks.
        scorer: "generate" or "rank" (:mod:`starmerge.evaluation.scoring`).
        rows: Held-out rows a task, at most.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: A model that cannot be found or loaded, a model called "base", two tasks of one
            name.
    """
    if BASE in models:
        raise UsageError(f"A model is called {BASE!r}, which is the base's name. Use NAME=PATH.")
    names = [task.name for task in tasks]
    twice = [task for task in names if names.count(task) > 1]
    if twice:
        raise UsageError(f"Two tasks are called {twice[0]!r}. Rename one of their files.")
    paths = {name: resolve(path).path for name, path in models.items()}
    adapters = {n: p for n, p in paths.items() if (p / "adapter_config.json").is_file()}
    wholes = {name: path for name, path in paths.items() if name not in adapters}
    examples = {task.name: task.examples("test", rows) for task in tasks}
    asked = {
        name: [task for task in tasks if name in (task.name, BASE) or name not in examples]
        for name in (BASE, *models)
    }
    total = sum(len(examples[task.name]) for own in asked.values() for task in own)
    scores: dict[str, dict[str, Score]] = {}
    with progress_bar("evaluating", total, show=progress) as advance:

        def ask(name: str, model: Any, tokenizer: Any) -> None:
            scores[name] = {
                task.name: accuracy(_answers(model, tokenizer, task, examples[task.name]))
                for task in asked[name]
            }

        def _answers(model: Any, tokenizer: Any, task: Task, rows: Sequence[Example]) -> list[Any]:
            return SCORERS[scorer](model, tokenizer, task, rows, advance)

        model, tokenizer = load_model(resolve(base).path)
        switch = AdapterSwitch(model, adapters)
        for name in (None, *adapters):
            with switch.active(name) as active:
                ask(name or BASE, active, tokenizer)
        del model, switch, active
        for name, path in wholes.items():
            gc.collect()
            model, tokenizer = load_model(path)
            ask(name, model, tokenizer)
            del model
    tuned = {name: scores[name][name] for name in models if name in examples}
    return Evaluation(scorer, {name: scores[name] for name in (BASE, *models)}, tuned)
