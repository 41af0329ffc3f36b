"""Charts of what merges kept."""

from __future__ import annotations

from pathlib import Path

from starmerge.evaluation.evaluation import Evaluation
from starmerge.evaluation.subjects import BASE

COLOURS = ("#9aa5b1", "#2f6690", "#d98e04", "#3a7d44", "#a23b72", "#6a4c93")


def plot_scores(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """Draw the scores of base, fine-tunes and merges on each task, as bars with intervals.

    The legend gives the normalised averages.

    Args:
        evaluation: The scores.
        path: Image file to write; its suffix gives the format.
        title: Stands above the chart.
    """
    import matplotlib.pyplot as plt  # noqa: PLC0415  (slow to import)

    tasks = evaluation.tasks
    columns = {BASE: evaluation.scores[BASE], "fine-tuned": evaluation.tuned}
    columns |= {model: evaluation.scores[model] for model in evaluation.others}
    columns = {name: scores for name, scores in columns.items() if scores}
    width = 0.8 / len(columns)
    figure, axes = plt.subplots(figsize=(1.3 * len(tasks) + 2.5, 4.5), layout="constrained")
    for number, (name, scores) in enumerate(columns.items()):
        shown = [(place, scores[task]) for place, task in enumerate(tasks) if task in scores]
        average = evaluation.normalised(name) if name in evaluation.scores else None
        axes.bar(
            [place + (number - (len(columns) - 1) / 2) * width for place, _ in shown],
            [score.value for _, score in shown],
            width,
            yerr=[
                [score.value - score.low for _, score in shown],
                [score.high - score.value for _, score in shown],
            ],
            error_kw={"linewidth": 0.8, "ecolor": "#444444"},
            color=COLOURS[number % len(COLOURS)],
            label=f"{name} ({average.value:.3f})" if average else name,
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 1)
    axes.set_ylabel("score, 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
    figure.legend(
        loc="outside lower center", ncols=len(columns), frameon=False, title="normalised average"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_methods(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """Draw the normalised averages of base and merges as dots with intervals, the best on top.

    A line stands at the base's average, another at 1, that of the fine-tunes. Models without a
    normalised average are left out.

    Args:
        evaluation: The scores.
        path: Image file to write; its suffix gives the format.
        title: Stands above the chart.
    """
    import matplotlib.pyplot as plt  # noqa: PLC0415  (slow to import)

    averages = {model: evaluation.normalised(model) for model in (BASE, *evaluation.others)}
    shown = sorted((a.value, model, a) for model, a in averages.items() if a is not None)
    figure, axes = plt.subplots(figsize=(7, 0.26 * len(shown) + 1.4), layout="constrained")
    for place, (value, model, average) in enumerate(shown):
        colour = COLOURS[0] if model == BASE else COLOURS[1]
        error = [[value - average.low], [average.high - value]]
        axes.errorbar(value, place, xerr=error, fmt="o", markersize=5, linewidth=1.2, color=colour)
        if model == BASE:
            axes.axvline(value, color=colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.axvline(1, color=COLOURS[0], linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(shown)), [model for _, model, _ in shown])
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("normalised average, 95 % interval (1: each task's own fine-tune)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title, loc="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
