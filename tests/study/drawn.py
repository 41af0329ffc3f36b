"""What charts of studies are drawn from in tests, and what was drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.scoring.comparison import Difference, Interval
from starmerge_models.evaluation.scoring.metrics import Prediction, Score, score
from starmerge_models.recipe import make_recipe
from starmerge_models.study.choose import Choice
from starmerge_models.study.race import Outcome, Standing

LONG = "organisation/" + "a-very-long-name-of-a-merged-model_" * 4
ADVERSARIAL = (
    f"{LONG}1",
    f"{LONG}2",
    "W" * 150,
    "_begins with a line",
    "$x^2$ \\frac{a}{b} %s {0}",
    "<b>bold</b>&amp;</script>",
    "two\nlines\tand a tab",
    "x y " * 40,
)
"""Names that a model may have and that a picture must hold."""


def score_of(value: float, rows: int = 20) -> Score:
    """Return an accuracy of so many rows."""
    right = round(rows * value)
    return score(
        [Prediction(str(row), "", "a", "a", float(row < right)) for row in range(rows)], "accuracy"
    )


def evaluation_of(
    values: Mapping[str, Mapping[str, float]], tuned: Mapping[str, float]
) -> Evaluation:
    """Return an evaluation from accuracies by model and task, and those of the fine-tunes."""
    best = {task: score_of(value) for task, value in tuned.items()}
    scores = {
        model: {task: score_of(value) for task, value in own.items()}
        for model, own in values.items()
    }
    return Evaluation("generate", "strict", scores | {t: {t: s} for t, s in best.items()}, best)


def choice() -> Choice:
    """Return a choice of two candidates after two rounds."""
    early, late = Interval(0.5, 0.4, 0.6), Interval(0.7, 0.6, 0.8)
    gap = Difference(-0.1, -0.2, -0.05, 0.01, "t", 50)
    standings = (
        Standing("auto", 2, 16, (early, late), None, None),
        Standing("star", 1, 8, (early,), gap, "behind"),
    )
    recipe = make_recipe({"base": "a/b", "models": ["c/d", "e/f"], "method": "auto"})
    outcome = Outcome(standings, "auto", ("auto",), "auto")
    return Choice(recipe, outcome, True, early, gap, {"iso_c": "It cannot."}, ("A note.",))


def frames(
    settings: Sequence[tuple[str, dict[str, Any], int, Sequence[float]]],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return averages and runs of a study.

    Args:
        settings: Label, parameters, number of models, and the value of each combination.
    """
    averages, runs = [], []
    for label, parameters, n, values in settings:
        common = {"label": label, "method": label.split(":")[0], "parameters": parameters, "n": n}
        mean = sum(values) / len(values)
        averages.append(
            common
            | {"combinations": len(values), "value": mean, "low": mean - 0.03, "high": mean + 0.02}
        )
        for combination, value in enumerate(values):
            runs.append(
                common
                | {"combination": combination, "models": ["a"] * n, "seed": 0, "value": value}
                | {"base": 0.25 + 0.1 * combination}
            )
    return pd.DataFrame(averages), pd.DataFrame(runs)


def texts(figure: Figure) -> list[Text]:
    """Return the texts that a figure draws, laid out."""
    found = []
    draw = Text.draw

    def noted(text: Text, renderer: Any) -> None:
        if text.get_text() and text.get_visible():
            found.append(text)
        draw(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        figure.draw_without_rendering()
    return found


def outside(figure: Figure) -> list[str]:
    """Return the texts that lie outside a figure, by more than half a pixel."""
    page = figure.bbox
    boxes = {text: text.get_window_extent() for text in texts(figure)}
    return [
        text.get_text()
        for text, box in boxes.items()
        if min(box.x0, box.y0) < -0.5 or box.x1 > page.x1 + 0.5 or box.y1 > page.y1 + 0.5
    ]
