"""The page of an evaluation: the models' scores with their uncertainty, and their answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.model_groups import BASE, TUNED
from starmerge_models.evaluation.scoring.comparison import Interval
from starmerge_models.evaluation.scoring.metrics import Score
from starmerge_models.evaluation.table import LEGEND, differences, notes
from starmerge_models.study.names import model_name
from starmerge_models.study.page.charts import dots, heat_map
from starmerge_models.study.page.page import Page, Section
from starmerge_models.study.page.parts import (
    Chart,
    Copy,
    KeyFigure,
    KeyFigures,
    Notes,
    Part,
    Provenance,
    Table,
    Text,
)
from starmerge_models.study.palette import BASE_COLOUR, plot_styles

ANSWERS = 200
"""Most rows of tasks in the table of answers."""

LETTERS = 160
"""Most characters shown of a response."""

PAIRS = 6
"""Most pairs of models with a sentence each, and a chart by task."""

_OVERALL = "all: normalised average"


def evaluation_title(base: str | Path, evaluation: Evaluation) -> str:
    """Return a title that names the base and says how many models were scored on how many tasks."""
    models = _counted(len(evaluation.others) or len(evaluation.scores), "model")
    return f"{model_name(base)}: {models} on {_counted(len(evaluation.tasks), 'task')}"


def evaluation_page(
    evaluation: Evaluation,
    *,
    title: str,
    remarks: Sequence[str] = (),
    commands: Mapping[str, str] | None = None,
) -> Page:
    """Make the page of an evaluation.

    Args:
        evaluation: The scores.
        title: The title; it should name models, not folders.
        remarks: Sentences to add, such as published numbers.
        commands: Commands to copy, by their description.
    """
    models, tasks = evaluation.others, evaluation.tasks
    rows = sum(score.n for score in evaluation.scores[BASE].values())
    subtitle = (
        f"{_counted(len(tasks), 'task')}, {rows} rows, {_counted(len(models), 'model')} besides "
        "the base, all on the same rows."
    )
    has_average = evaluation.normalised(BASE) is not None
    sections = [
        Section("Summary", _summary(evaluation)),
        *([Section("Averages", _averages(evaluation))] if has_average and models else ()),
        Section("Task by task", _by_task(evaluation)),
        *([Section("Differences", _differences(evaluation))] if len(models) > 1 else ()),
        Section("Answers", _answers(evaluation)),
        Section("All numbers", [_numbers(evaluation)]),
        Section("How to read this", _reading(evaluation, remarks, commands or {})),
    ]
    return Page(title, subtitle, sections)


def _summary(evaluation: Evaluation) -> list[Part]:
    shown = plot_styles(evaluation.others)
    figures = []
    for model in (*evaluation.others, BASE):
        average = evaluation.normalised(model)
        if average is not None:
            colour = shown[model].colour if model in shown else BASE_COLOUR
            note = f"of the fine-tunes' scores, 95 % interval {_ends(average)}"
            figures.append(KeyFigure(model, f"{average.value:.3f}", note, colour))
        else:
            scores = [score.value for score in evaluation.scores[model].values()]
            values = [0 if math.isnan(value) else value for value in scores]
            colour = shown[model].colour if model in shown else BASE_COLOUR
            note = f"mean of {_counted(len(values), 'score')}"
            figures.append(KeyFigure(model, f"{sum(values) / len(values):.3f}", note, colour))
    return [KeyFigures(figures), *_listed(_sentences(evaluation))]


def _sentences(evaluation: Evaluation) -> list[str]:
    """Return sentences on the differences of pairs of models; of many, only pairs with the best."""
    sentences = differences(evaluation)
    if len(sentences) <= PAIRS:
        return sentences
    averages = {model: evaluation.normalised(model) for model in evaluation.others}
    known = {model: average.value for model, average in averages.items() if average is not None}
    if not known:
        return []
    best = max(known, key=known.__getitem__)
    return [
        sentence
        for pair, sentence in zip(_pairs(evaluation), sentences, strict=True)
        if best in pair
    ]


def _pairs(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return the pairs of merged models, in the order of their sentences."""
    return [
        (a, b) for number, a in enumerate(evaluation.others) for b in evaluation.others[:number]
    ]


def _averages(evaluation: Evaluation) -> list[Part]:
    rows: list[dict[str, Any]] = []
    for model in (*evaluation.others, BASE):
        average = evaluation.normalised(model)
        if average is not None:
            ends = {"value": average.value, "low": average.low, "high": average.high}
            rows.append({"row": model, "label": model, **ends})
    merged = [row for row in rows if row["label"] != BASE]
    # The base is in the row of each merge.
    base = [{**rows[-1], "row": row["row"]} for row in merged]
    best = max(merged, key=lambda row: row["value"])
    table = pd.DataFrame(
        [
            {"model": row["row"], "average": row["value"], "low": row["low"], "high": row["high"]}
            | {"− base": _against_base(evaluation, row["row"])}
            for row in rows
        ]
    )
    return [
        Text(
            "The mean over tasks of a model's score, divided by that of the task's own "
            "fine-tune: 1 is as good as the fine-tunes on average."
        ),
        Chart(
            dots(pd.DataFrame([*merged, *base]), title="normalised average, 95 % interval"),
            "Normalised averages",
            f"A row for each model. The highest average is that of {best['row']}, "
            f"{best['value']:.3f}. The dashed line is the base.",
        ),
        Table(
            table, "Normalised averages with their 95 % intervals",
            intervals={"average": ("low", "high")},
        ),
    ]  # fmt: skip


def _against_base(evaluation: Evaluation, model: str) -> str:
    found = None if model == BASE else evaluation.difference(model, BASE)
    if found is None:
        return "–"
    verdict = "clear" if found.clear else "not clear"
    return f"{_signed(found.value)} [{_signed(found.low)}, {_signed(found.high)}], {verdict}"


def _by_task(evaluation: Evaluation) -> list[Part]:
    columns: dict[str, Mapping[str, Score]] = {BASE: evaluation.scores[BASE]}
    if evaluation.tuned:
        columns[TUNED] = evaluation.tuned
    columns |= {model: evaluation.scores[model] for model in evaluation.others}
    tidy = [
        {
            "row": task,
            "label": model,
            "value": score.value,
            "low": score.low,
            "high": score.high,
            "metric": score.metric,
            "rows": score.n,
            "unreadable": f"{score.unparsed:.0%}",
        }
        for model, scores in columns.items()
        for task, score in scores.items()
    ]
    wide = pd.DataFrame(
        [
            {"task": task, "metric": evaluation.scores[BASE][task].metric}
            | {
                key: number
                for model, scores in columns.items()
                for key, number in _spread(model, scores.get(task)).items()
            }
            for task in evaluation.tasks
        ]
    )
    if set(wide.metric) == {"accuracy"}:
        wide = wide.drop(columns="metric")
    parts: list[Part] = []
    if any(not math.isnan(row["value"]) for row in tidy):  # type: ignore[arg-type]
        parts.append(
            Chart(
                dots(pd.DataFrame(tidy), title="score, 95 % interval"),
                "Scores by task",
                "A row for each task, with a dot for each model. Dashed lines are the base, solid "
                "lines the tasks' own fine-tunes; pale bands are their intervals. Click a name in "
                "the legend to bring its dots to the front. The table below has the same numbers.",
            )
        )
    parts.append(
        Table(
            wide, "Scores by task and model, with 95 % intervals",
            titles={_columns(model)[0]: model for model in columns},
            intervals={_columns(model)[0]: _columns(model)[1:] for model in columns},
            formats={_columns(model)[0]: ".2f" for model in columns},
        )
    )  # fmt: skip
    shares = pd.DataFrame(
        [
            {"task": task, "model": model, "share": score.value / evaluation.tuned[task].value}
            for model in (BASE, *evaluation.others)
            for task, score in evaluation.scores[model].items()
            if task in evaluation.tuned and evaluation.tuned[task].value > 0
        ]
    )
    if len(shares) and not shares.share.isna().all():
        parts.append(
            Chart(
                heat_map(shares, "model", "task", "share"),
                "Share of the fine-tune's score",
                "A row for each task, a column for each model; 1 is as good as the fine-tune.",
            )
        )
    return parts


def _spread(model: str, score: Score | None) -> dict[Any, float]:
    values = (math.nan,) * 3 if score is None else (score.value, score.low, score.high)
    return dict(zip(_columns(model), values, strict=True))


def _columns(model: str) -> tuple[tuple[str, str], tuple[str, str], tuple[str, str]]:
    """Return unique keys of a model's score and its interval."""
    return (model, "score"), (model, "low"), (model, "high")


def _differences(evaluation: Evaluation) -> list[Part]:
    pairs = _pairs(evaluation)
    rows = []
    for first, second in pairs:
        overall = evaluation.difference(first, second)
        found = {} if overall is None else {_OVERALL: overall}
        for task, one in (found | evaluation.by_task(first, second)).items():
            rows.append(
                {
                    "models": f"{first} − {second}",
                    "task": task,
                    "difference": one.value,
                    "low": one.low,
                    "high": one.high,
                    "p": one.p_value,
                    "verdict": "no clear difference"
                    if not one.clear
                    else f"{first if one.value > 0 else second} is better",
                }
            )
    frame = pd.DataFrame(rows)
    drawn = frame.rename(columns={"task": "row", "models": "label", "difference": "value"})
    description = "A row for each task, a dot for each pair of models."
    if len(pairs) > PAIRS:
        drawn = drawn[drawn.row == _OVERALL].assign(row=lambda pair: pair.label)
        description = "A row for each pair of models, by their normalised averages."
    parts: list[Part] = [
        Text(
            "Paired by rows, so that a difference may be clear although the intervals of the two "
            "scores overlap. The p-values are from McNemar's exact test for accuracies and from a "
            "paired bootstrap for other metrics; those of tasks are corrected for the number of "
            "tasks (Benjamini and Hochberg), but not for the number of pairs of models."
        )
    ]
    if not drawn.value.isna().all():
        chart = dots(drawn, title="difference, paired 95 % interval", zero_to_one=False)
        description += " Right of 0, the first of the pair is better."
        parts.append(Chart(chart, "Differences of two models", description))
    table = Table(
        frame, "Paired differences with their 95 % intervals",
        intervals={"difference": ("low", "high")},
        formats={"difference": "+.3f", "p": ".2g"},
        choices=("models", "verdict"),
    )  # fmt: skip
    return [*parts, table]


def _answers(evaluation: Evaluation) -> list[Part]:
    """Return a table of the models' answers, from all tasks in turn up to :data:`ANSWERS` rows."""
    asked = {model: evaluation.scores[model] for model in (BASE, *evaluation.others)}
    by_task: list[list[dict[Any, str]]] = []
    for task in evaluation.tasks:
        columns = {model: scores[task] for model, scores in asked.items()}
        if task in evaluation.tuned:
            columns[TUNED] = evaluation.tuned[task]
        answered = {
            model: {prediction.id: prediction for prediction in score.predictions}
            for model, score in columns.items()
        }
        by_task.append(
            [
                {"task": task, "row": prediction.id, "right answer": _short(prediction.gold)}
                | {
                    (model, "answer"): _answer(found.get(prediction.id))
                    for model, found in answered.items()
                }
                for prediction in evaluation.scores[BASE][task].predictions
            ]
        )
    total = sum(map(len, by_task))
    rows = [row for turn in zip_longest(*by_task) for row in turn if row is not None][:ANSWERS]
    order = {task: number for number, task in enumerate(evaluation.tasks)}
    rows.sort(key=lambda row: order[row["task"]])
    titles = {(model, "answer"): model for model in (*asked, TUNED)}
    said = f"The first {len(rows)} of {total} rows" if len(rows) < total else f"All {total} rows"
    return [
        Text(
            f"{said}. ✓ marks right answers, ✗ wrong ones; a number is a fractional credit. Filter "
            "by ✗ to see mistakes."
        ),
        Table(pd.DataFrame(rows), "Answers of the models", titles=titles, choices=("task",)),
    ]


def _answer(prediction: Any) -> str:
    if prediction is None:
        return "–"
    credit = prediction.credit
    mark = "" if credit is None else {1: "✓ ", 0: "✗ "}.get(credit, f"{credit:.2f} ")
    return f"{mark}{_short(prediction.response)}"


def _short(text: str) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"


def _numbers(evaluation: Evaluation) -> Table:
    frame = pd.DataFrame(evaluation.to_records()).drop(columns=["scorer", "matching"])
    frame = frame.rename(columns={"n": "rows", "unparsed": "unreadable"})
    return Table(
        frame, "Every score, with its 95 % interval",
        intervals={"score": ("low", "high")},
        formats={"unreadable": ".0%"},
        choices=("model", "task"),
    )  # fmt: skip


def _reading(
    evaluation: Evaluation, remarks: Sequence[str], commands: Mapping[str, str]
) -> list[Part]:
    scored = {
        "generate": "Answers were generated greedily and parsed.",
        "rank": "The most likely of the possible answers was taken.",
    }
    lines = [scored.get(evaluation.scorer, ""), LEGEND, *remarks, *notes(evaluation)]
    parts: list[Part] = [*_listed([line for line in lines if line])]
    parts += [Copy(label, text) for label, text in commands.items()]
    provenance = evaluation.provenance
    content = {"scorer": evaluation.scorer, "matching": evaluation.mode}
    if provenance is not None:
        content |= provenance.to_json()
    return [*parts, Provenance(content, "Where the numbers come from")]


def _listed(lines: Sequence[str]) -> list[Part]:
    return [Notes(lines)] if lines else []


def _ends(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
