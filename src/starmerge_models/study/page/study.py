"""The page of a study: normalised averages by method, number of models and parameter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable

import pandas as pd

from starmerge_models.evaluation.model_groups import BASE
from starmerge_models.methods.pipeline import make_pipeline
from starmerge_models.study.averages import Averages, RunAverage
from starmerge_models.study.frames import (
    best_by_number,
    by_number,
    by_parameter,
    shares_by_task,
)
from starmerge_models.study.grids import GridBest, best_of_grids
from starmerge_models.study.outputs import figure_entries, title_of
from starmerge_models.study.page.charts import curves, dots, heat_map
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
from starmerge_models.study.study_file import FigureEntry, FigureKind
from starmerge_models.study.tables import GRID_LEGEND, LEGEND, failures, left_out

KEYS = 6
"""Most methods with a key figure at the top of the page."""


def study_page(averages: Averages) -> Page:
    """Make the page of a study."""
    store = averages.store
    head = store.head
    merges = [record for record in store.records if record.run.kind == "merge"]
    name, about = head["study"]["name"], head["study"]["description"].strip().removesuffix(".")
    subtitle = (
        f"{f'Study {name}: ' if about else ''}{len(merges)} merges of {len(head['models'])} "
        f"fine-tunes of {head['base']['name']}, on {len(head['tasks'])} tasks."
    )
    grids = [grid for grid in best_of_grids(averages) if grid.points > 1]
    sections = [
        Section("Summary", _summary(averages)),
        *(Section(_heading(entry), _SHOWN[entry.figure](averages, entry))
          for entry in figure_entries(averages)),
        Section("Averages", _averages(averages)),
        *([Section("Best of the grids", _grids(grids))] if grids else ()),
        Section("All runs", [_runs(averages)]),
        Section("How to read this", _reading(averages)),
    ]  # fmt: skip
    return Page(about or f"Study: {name}", subtitle, sections)


def _summary(averages: Averages) -> list[Part]:
    most = max(run.n for run in averages.runs)
    runs = [run for run in averages.runs if run.n == most]
    means = {
        label: averages.mean([run for run in runs if run.label == label])
        for label in dict.fromkeys(run.label for run in runs)
    }
    best = sorted(means, key=lambda label: -means[label].value)[:KEYS]
    shown = plot_styles(best)
    base = averages.base_mean(runs)
    figures = [
        KeyFigure(
            label,
            f"{means[label].value:.3f}",
            f"95 % interval [{means[label].low:.3f}, {means[label].high:.3f}]",
            shown[label].colour,
        )
        for label in best
    ]
    interval = f"95 % interval [{base.low:.3f}, {base.high:.3f}]"
    figures.append(KeyFigure(BASE, f"{base.value:.3f}", interval, BASE_COLOUR))
    several = f"The best {len(best)} of {len(means)} settings" if len(means) > KEYS else "Settings"
    parts: list[Part] = [
        KeyFigures(figures),
        Text(
            f"{several} at {most} merged models: the mean over tasks of a merge's score, divided "
            "by that of the task's own fine-tune. The best of many is biased upwards."
        ),
    ]
    if len(best) > 1:
        parts.append(Notes([_comparison(averages, runs, best[0], other) for other in best[1:3]]))
    return parts


def _comparison(averages: Averages, runs: list[RunAverage], first: str, second: str) -> str:
    """Describe the difference of two settings in a sentence."""
    of = {label: [run for run in runs if run.label == label] for label in (first, second)}
    found = averages.difference(of[first], of[second])
    better = first if found.value > 0 else second
    verdict = f"{better} is better" if found.clear else "no clear difference"
    if found.value == found.low == found.high == 0:
        return f"{first} and {second} score the same on these rows."
    return (
        f"{first} − {second}: {found.value:+.3f}, paired 95 % interval [{found.low:+.3f}, "
        f"{found.high:+.3f}]: {verdict}."
    )


def _number(averages: Averages, entry: FigureEntry) -> list[Part]:
    means, runs = by_number(averages, entry.methods)
    return [
        Chart(
            curves(means, runs=runs),
            title_of(averages.store, entry),
            "A curve for each method: the mean normalised average over the combinations, with its "
            "interval; small dots are single combinations, the dashed line is the base on the same "
            "tasks. Click a name in the legend to bring its curve forward.",
        )
    ]


def _parameter(averages: Averages, entry: FigureEntry) -> list[Part]:
    parameter = str(entry.parameter)
    means, runs = by_parameter(averages, parameter, entry.methods)
    return [
        Chart(
            curves(means, parameter, runs=runs),
            title_of(averages.store, entry),
            f"The normalised average against {parameter}, with its interval; small dots are single "
            "combinations, the dashed line is the base.",
        )
    ]


def _best(averages: Averages, entry: FigureEntry) -> list[Part]:
    parameter = str(entry.parameter)
    frame = best_by_number(averages, parameter, entry.methods)
    drawn = frame.assign(row=[f"n = {n}" for n in frame.n], average=frame.value, value=frame.best)
    table = Table(
        frame, f"The best {parameter} for each number of models",
        intervals={"best": ("low", "high")},
        formats={"best": "g"},
        titles={"value": "normalised average"},
    )  # fmt: skip
    chart = Chart(
        dots(drawn.drop(columns=["best", "n"]), title=f"best {parameter}", zero_to_one=False),
        title_of(averages.store, entry),
        "A row for each number of models. The line spans the middle 95 % of the best values in "
        "resamples of the rows: if it is long, the rows do not determine the best value.",
    )
    return [chart, table]


def _one_shot(averages: Averages, entry: FigureEntry) -> list[Part]:
    rows = []
    shown = [
        grid
        for grid in best_of_grids(averages)
        if entry.methods is None or grid.method in entry.methods
    ]
    most = max(grid.n for grid in shown)
    for grid in shown:
        if grid.n == most:
            for label, interval in (("default", grid.default), ("best of the grid", grid.best)):
                if interval is not None:
                    ends = {"low": interval.low, "high": interval.high}
                    rows.append(
                        {"row": grid.method, "label": label, "value": interval.value} | ends
                    )
    return [
        Chart(
            dots(pd.DataFrame(rows), title="normalised average, 95 % interval"),
            title_of(averages.store, entry),
            f"A row for each method, at {most} merged models: its defaults, and the best of its "
            "grid, which was selected on the rows that it is scored on.",
        )
    ]


def _tasks(averages: Averages, entry: FigureEntry) -> list[Part]:
    shares = shares_by_task(averages, entry.methods)
    return [
        Chart(
            heat_map(shares.rename(columns={"label": "method"}), "method", "task", "share"),
            title_of(averages.store, entry),
            "A row for each task, a column for each setting, at the most merged models; 1 is as "
            "good as the fine-tune.",
        )
    ]


_SHOWN: dict[FigureKind, Callable[[Averages, FigureEntry], list[Part]]] = {
    "number": _number,
    "parameter": _parameter,
    "best": _best,
    "one-shot": _one_shot,
    "tasks": _tasks,
}


def _heading(entry: FigureEntry) -> str:
    return {
        "number": "By number of models",
        "parameter": f"By {entry.parameter}",
        "best": f"The best {entry.parameter}",
        "one-shot": "Without a search",
        "tasks": "Task by task",
    }[entry.figure]


def _averages(averages: Averages) -> list[Part]:
    frame = averages.to_frame().drop(columns=["method", "parameters"])
    table = Table(
        frame, "Normalised averages, with their 95 % intervals",
        intervals={"value": ("low", "high"), "base": ("base_low", "base_high")},
        titles={"value": "normalised average", "label": "method", "n": "models"},
        choices=("n",),
    )  # fmt: skip
    return [table]


def _grids(grids: list[GridBest]) -> list[Part]:
    rows = []
    for grid in grids:
        row = {"method": grid.method, "models": grid.n, "points": grid.points}
        for name, interval in (("default", grid.default), ("best", grid.best)):
            row[name] = None if interval is None else interval.value
            row[f"{name} low"] = None if interval is None else interval.low
            row[f"{name} high"] = None if interval is None else interval.high
        rows.append(row | {"at": grid.best_label, "held out": grid.held_out})
    table = Table(
        pd.DataFrame(rows), "The defaults and the best of each grid",
        intervals={name: (f"{name} low", f"{name} high") for name in ("default", "best")},
        choices=("method", "models"),
    )  # fmt: skip
    return [Text(GRID_LEGEND), table]


def _runs(averages: Averages) -> Table:
    frame = averages.store.to_frame()
    frame = frame.assign(
        models=[", ".join(models) for models in frame.models],
        parameters=[json.dumps(parameters) for parameters in frame.parameters],
    )
    kept = ["label", "n", "combination", "models", "task", "score", "low", "high", "rows"]
    return Table(
        frame[[*kept, "unparsed", "merging", "asking", "parameters"]],
        "Every run and task",
        intervals={"score": ("low", "high")},
        titles={
            "label": "method",
            "n": "merged",
            "unparsed": "unreadable",
            "merging": "merging, s",
            "asking": "asking, s",
        },
        formats={"unparsed": ".0%", "merging": ".2f", "asking": ".1f"},
        choices=("label", "task"),
    )


def _reading(averages: Averages) -> list[Part]:
    store = averages.store
    most = max(run.n for run in averages.runs)
    runs = [run for run in averages.runs if run.n == most]
    best = max(runs, key=lambda run: run.value).record.run
    usual = make_pipeline(best.method).parameters()
    settings = "".join(
        f" -p {shlex.quote(f'{key}={value if isinstance(value, str) else json.dumps(value)}')}"
        for key, value in best.parameters.items()
        if value != usual[key]
    )
    parts: list[Part] = [
        Notes([LEGEND, *left_out(averages), *failures(store)]),
        Copy(
            f"The best single merge of {most} models, with yours in place of BASE and MODEL",
            f"starmerge merge BASE MODEL... -m {shlex.quote(best.method)}{settings} -o merged",
        ),
    ]
    content = {key: value for key, value in store.head.items() if key != "schema"}
    return [*parts, Provenance(content, "Where the numbers come from")]
