"""The charts, read back from their SVG."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest

from starmerge.evaluation.evaluation import Evaluation
from starmerge.evaluation.scoring.metrics import Prediction, Score, score
from starmerge.study.figures import plot_methods


def _score(right: int) -> Score:
    return score(
        [Prediction(str(row), "", "a", "a", float(row < right)) for row in range(20)], "accuracy"
    )


def _elements(chart: Path, tag: str) -> Iterator[ElementTree.Element]:
    return ElementTree.parse(chart).iter("{http://www.w3.org/2000/svg}" + tag)


def test_methods_stand_by_their_score_the_best_on_top(tmp_path: Path) -> None:
    values = {"base": 0.2, "star": 0.6, "average": 0.5, "star+ties eta=60": 0.8}
    scores = {name: {"a": _score(round(20 * value))} for name, value in values.items()}
    chart = tmp_path / "chart.svg"
    with plt.rc_context({"svg.fonttype": "none"}):
        evaluation = Evaluation(
            "rank", "strict", scores | {"a": {"a": _score(20)}}, {"a": _score(20)}
        )
        plot_methods(evaluation, chart, title="Eight adapters")

    texts = {element.text: element.attrib for element in _elements(chart, "text")}
    assert "Eight adapters" in texts
    heights = {name: float(texts[name]["y"]) for name in values}
    assert sorted(heights, key=heights.__getitem__) == sorted(
        values, key=values.__getitem__, reverse=True
    )
    low, high = float(texts["0.2"]["x"]), float(texts["0.8"]["x"])
    expected = [low + (value - 0.2) / 0.6 * (high - low) for value in values.values()]
    uses = [element.attrib for element in _elements(chart, "use")]
    dots = sorted(
        (float(use["y"]), float(use["x"])) for use in uses if use["style"].startswith("fill")
    )
    assert [x for _, x in dots] == pytest.approx(sorted(expected, reverse=True), abs=0.01)
    assert [y for y, _ in dots] == pytest.approx(sorted(heights.values()), abs=6)
