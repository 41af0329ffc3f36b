"""The scores of an evaluation by model and task: averages, differences, tables of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from starmerge_models.evaluation.model_groups import BASE, TUNED
from starmerge_models.evaluation.provenance import Provenance
from starmerge_models.evaluation.scoring.comparison import (
    Difference,
    Interval,
    by_task,
    difference,
    mean_ratio,
    normalised_average,
)
from starmerge_models.evaluation.scoring.metrics import DEFAULT, Score
from starmerge_models.evaluation.text_tables import html_table, interval_cell

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
"""Version of the output of :meth:`Evaluation.to_json`; incremented when its meaning changes."""

AVERAGE = "normalised average"
"""Label of the last row of the cells."""

_SHOWN = 8
"""Most models and most tasks that ``repr`` lists."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Scores by model and task; a notebook shows them as a table."""

    scorer: str
    mode: str
    scores: Mapping[str, Mapping[str, Score]]
    """By model (the base first), then by task."""
    tuned: Mapping[str, Score]
    """By task, the score of its own fine-tune: the adapter or model with the task's name."""
    provenance: Provenance | None = None
    """Provenance of models and rows; None for scores not computed by :func:`evaluate`."""

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

    def __repr__(self) -> str:
        """Return a few lines: the tasks, and each model with its average score."""
        tuned, others = len(self.tuned), self.others
        lines = [
            f"Evaluation: {len(self.scores)} models, {len(self.tasks)} tasks "
            f"({self.scorer}, {self.mode}), {tuned} fine-tunes",
            f"  tasks: {shortened(self.tasks)}",
        ]
        for model in (BASE, *others)[:_SHOWN]:
            lines.append(f"  {model}: {self._average(model)}")
        if len(others) >= _SHOWN:
            lines.append(f"  … and {len(others) + 1 - _SHOWN} more models: to_frame() has all")
        return "\n".join(lines)

    def _average(self, model: str) -> str:
        """Return a model's average as text: the normalised average where it is defined."""
        value = mean_ratio(self.scores[model], self.tuned)
        if value is not None:
            return f"normalised average {value:.3f}"
        values = [score.value for score in self.scores[model].values()]
        return f"mean score {np.mean(np.nan_to_num(values)):.3f}"

    def _repr_html_(self) -> str:
        """Return the table of scores for a notebook."""
        return html_table(self.cells())

    def cells(self) -> list[list[str]]:
        """Return the scores as text cells: a row for each task, a column for each model.

        The first row is the header. The tasks' own fine-tunes share the column "fine-tuned". The
        last row has the normalised averages, if every task has a fine-tune.
        """
        columns: dict[str, dict[str, str]] = {}
        columns[BASE] = {task: _cell(score) for task, score in self.scores[BASE].items()}
        if self.tuned:
            columns[TUNED] = {task: _cell(score) for task, score in self.tuned.items()}
        for model in self.others:
            columns[model] = {task: _cell(score) for task, score in self.scores[model].items()}
        metrics = {task: score.metric for task, score in self.scores[BASE].items()}
        is_plain = set(metrics.values()) == {DEFAULT}
        rows = [["task", "n", *columns]]
        for task, metric in metrics.items():
            n = self.scores[BASE][task].n
            title = task if is_plain else f"{task} ({metric})"
            rows.append([title, str(n), *(cells.get(task, "") for cells in columns.values())])
        averages = {model: self.normalised(model) for model in (BASE, *self.others)}
        if any(averages.values()):
            cells = [interval_cell(averages[c]) if c in averages else "1" for c in columns]
            rows.append([AVERAGE, "", *cells])
        return rows

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each score, with the columns of :meth:`to_records`."""
        import pandas as pd  # noqa: PLC0415  (slow to import)

        return pd.DataFrame(self.to_records())

    def to_records(self) -> list[dict[str, Any]]:
        """Return a flat JSON-serialisable record for each score."""
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
        """Return everything except the predictions as JSON data, with 95 % intervals."""
        averages = {model: self.normalised(model) for model in (BASE, *self.others)}
        pairs = [(a, b) for n, a in enumerate(self.others) for b in self.others[:n]]
        return {
            "schema_version": SCHEMA,
            "scorer": self.scorer,
            "matching": self.mode,
            "provenance": None if self.provenance is None else self.provenance.to_json(),
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


def shortened(names: Sequence[str]) -> str:
    """Return names as text: the first eight and the number of the others."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} … and {len(names) - _SHOWN} more"


def _cell(score: Score) -> str:
    if math.isnan(score.value):
        return "–"
    text = f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"
    return f"{text} u {score.unparsed:.0%}" if score.unparsed else text
