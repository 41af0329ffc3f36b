"""A figure of an evaluation: scores as dots with intervals, a row per task and the average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.model_groups import BASE
from starmerge_models.evaluation.scoring.comparison import Interval
from starmerge_models.evaluation.scoring.metrics import Score
from starmerge_models.study.figures.style import (
    BASE_LINE,
    GRID,
    SIZE,
    TEXT,
    TUNED_LINE,
    add_legend,
    base_handle,
    dot_of,
    label_rows,
    new_figure,
    save,
    styled,
    tuned_handle,
)
from starmerge_models.study.palette import PlotStyle, plot_styles

AVERAGE = "normalised average"

_STEP, _GAP = 0.115, 0.2
"""Height of a model in a row, and the free space between rows, in inches."""


def plot_scores(evaluation: Evaluation, path: Path, *, title: str) -> Figure:
    """Draw the scores on each task, merges as dots, base and fine-tunes as lines, with intervals.

    Base and fine-tunes are vertical lines behind the dots of a row, with a pale band for their
    intervals, so that a dot shows where a merge lies between them. The last row, with its own axis,
    has the normalised averages, if every task has its fine-tune; the legend lists their values.

    Args:
        evaluation: The scores.
        path: Figure to write; see :func:`starmerge_models.study.figures.style.save`.
        title: The figure's title; it should name models, not folders.
    """
    tasks, models = evaluation.tasks, evaluation.others
    averages = {model: evaluation.normalised(model) for model in (BASE, *models)}
    has_average = any(averages.values())
    shown = plot_styles(models)
    row = _STEP * max(2, len(models)) + _GAP
    heights = [row * len(tasks), *([row] if has_average else ())]
    with styled():
        height = sum(heights) + 0.55 * len(heights) + 0.2 + 0.18 * math.ceil((len(models) + 2) / 4)
        figure = new_figure(7.5, height, title)
        panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        _draw_rows(panels[0], tasks, evaluation.scores, evaluation.tuned, shown)
        panels[0].set_xlabel("score, 95 % interval")
        panels[0].set_xlim(*_limits(panels[0]))
        if has_average:
            rows = {model: {AVERAGE: one} for model, one in averages.items() if one is not None}
            _draw_rows(panels[1], [AVERAGE], rows, {AVERAGE: Interval(1, 1, 1)}, shown)
            panels[1].set_yticks([0], [AVERAGE], fontweight="bold", fontsize=SIZE, color=TEXT)
            panels[1].set_xlabel(f"{AVERAGE} (1: each task's own fine-tune), 95 % interval")
            panels[1].set_xlim(*_limits(panels[1]))
        handles = [Line2D([], [], **dot_of(style)) for style in shown.values()]
        lines = {BASE: base_handle()} | ({"fine-tuned": tuned_handle()} if evaluation.tuned else {})
        names = [
            f"{name} ({average.value:.3f})" if (average := averages.get(name)) else name
            for name in (*shown, *lines)
        ]
        add_legend(figure, [*handles, *lines.values()], names)
    return save(figure, path)


def _draw_rows(
    axes: Axes,
    rows: Sequence[str],
    scores: Mapping[str, Mapping[str, Score | Interval]],
    tuned: Mapping[str, Score | Interval],
    shown: Mapping[str, PlotStyle],
) -> None:
    """Draw a row for each task, and in it a line for each merged model."""
    count = max(2, len(shown))
    share = count * _STEP / (count * _STEP + _GAP)
    for place, task in enumerate(rows):
        for score, line in ((scores[BASE].get(task), BASE_LINE), (tuned.get(task), TUNED_LINE)):
            if score is None or math.isnan(score.value):
                continue
            # The row's middle is at `place`, and offsets are fractions of its height.
            low, high = place - share / 2 - 0.06, place + share / 2 + 0.06
            axes.plot([score.value] * 2, [low, high], **line)
            if score.high > score.low:
                axes.fill_betweenx(
                    [low, high], score.low, score.high, color=line["color"], alpha=0.13, linewidth=0
                )
        if place:
            axes.axhline(place - 0.5, color=GRID, linewidth=0.7, zorder=0)
    for number, (model, style) in enumerate(shown.items()):
        found = [
            (place + share * ((number + 0.5) / len(shown) - 0.5), score)
            for place, task in enumerate(rows)
            if (score := scores.get(model, {}).get(task)) is not None
            and not math.isnan(score.value)
        ]
        axes.errorbar(
            [score.value for _, score in found],
            [height for height, _ in found],
            xerr=[
                [max(0.0, score.value - score.low) for _, score in found],
                [max(0.0, score.high - score.value) for _, score in found],
            ],
            **dot_of(style),
            elinewidth=1.2,
            zorder=3,
        )
    label_rows(axes, rows)


def _limits(axes: Axes) -> tuple[float, float]:
    """Return the limits of an axis that includes all data and the range 0 to 1."""
    low, high = axes.dataLim.intervalx
    low, high = min(0.0, low), max(1.0, high)
    room = 0.015 * (high - low)
    return low - room, high + room
