"""A figure of many methods: a row for each, sorted by normalised average."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.model_groups import BASE
from starmerge_models.study.figures.style import (
    BASE_LINE,
    TUNED_LINE,
    add_legend,
    base_handle,
    label_rows,
    new_figure,
    save,
    styled,
    tuned_handle,
)
from starmerge_models.study.palette import COLOURS


def plot_methods(evaluation: Evaluation, path: Path, *, title: str) -> Figure:
    """Draw the normalised averages of the merges as dots with intervals, the best on top.

    A dashed line marks the base's average, a solid line the fine-tunes' (1). Models without a
    normalised average are omitted.

    Args:
        evaluation: The scores.
        path: Figure to write; see :func:`starmerge_models.study.figures.style.save`.
        title: The figure's title.
    """
    averages = {model: evaluation.normalised(model) for model in evaluation.others}
    shown = sorted(
        ((average.value, model, average) for model, average in averages.items() if average),
        reverse=True,
    )
    base = evaluation.normalised(BASE)
    with styled():
        figure = new_figure(7, 0.24 * len(shown) + 1, title)
        axes = figure.subplots()
        for place, (value, _, average) in enumerate(shown):
            axes.errorbar(
                value,
                place,
                xerr=[[max(0.0, value - average.low)], [max(0.0, average.high - value)]],
                fmt="o",
                color=COLOURS[0],
                elinewidth=1.2,
            )
        if base is not None:
            axes.axvspan(base.low, base.high, color=BASE_LINE["color"], alpha=0.15, linewidth=0)
            axes.axvline(base.value, **BASE_LINE)
        axes.axvline(1, **TUNED_LINE)
        label_rows(axes, [model for _, model, _ in shown], width=2.6)
        axes.set_xlabel("normalised average, 95 % interval")
        add_legend(figure, [base_handle(), tuned_handle()], ["base", "fine-tunes"])
    return save(figure, path)
