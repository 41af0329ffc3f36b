"""The charts of an evaluation: what is drawn, and that it fits."""

from pathlib import Path

import pytest
from matplotlib.collections import PathCollection
from matplotlib.container import ErrorbarContainer
from PIL import Image

from starmerge_models.errors import UsageError
from starmerge_models.study.figures import plot_methods, plot_scores, style
from starmerge_models.study.palette import BASE_COLOUR, plot_styles
from tests.study.conftest import DPI
from tests.study.drawn import ADVERSARIAL, evaluation_of, outside, texts

TASKS = ("digits", "past", "pos")
VALUES = {
    "base": (0.1, 0.2, 0.3),
    "average": (0.4, 0.5, 0.6),
    "star": (0.5, 0.3, 0.7),
    "auto": (0.9, 0.7, 0.8),
    "ties": (0.2, 0.25, 0.3),
}
TUNED = dict(zip(TASKS, (1.0, 0.8, 0.9), strict=True))


def _evaluation(names=tuple(VALUES)):
    values = {
        name: dict(zip(TASKS, own, strict=True))
        for name, own in zip(names, VALUES.values(), strict=True)
    }
    return evaluation_of(values, TUNED)


def _errorbars(axes) -> list[ErrorbarContainer]:
    return [one for one in axes.containers if isinstance(one, ErrorbarContainer)]


def test_a_dot_stands_at_each_score_in_the_row_of_its_task(tmp_path: Path) -> None:
    evaluation = _evaluation()
    figure = plot_scores(evaluation, tmp_path / "chart.png", title="demo: 3 fine-tunes of Tiny")
    scores, averages = figure.axes
    assert [label.get_text() for label in scores.get_yticklabels()] == list(TASKS)
    models = list(VALUES)[1:]
    for model, bars in zip(models, _errorbars(scores), strict=True):
        line, _, (interval,) = bars
        assert line.get_xdata() == pytest.approx(VALUES[model])
        assert [round(height) for height in line.get_ydata()] == [0, 1, 2]
        assert line.get_color() == plot_styles(models)[model].colour
        for segment, task in zip(interval.get_segments(), TASKS, strict=True):
            score = evaluation.scores[model][task]
            assert segment[:, 0] == pytest.approx([score.low, score.high])
    heights = [bars[0].get_ydata()[0] for bars in _errorbars(scores)]
    assert heights == sorted(heights)
    assert -0.5 < min(heights) < max(heights) < 0.5
    for model, bars in zip(models, _errorbars(averages), strict=True):
        assert bars[0].get_xdata() == pytest.approx([evaluation.normalised(model).value])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    values = {name: evaluation.normalised(name).value for name in (*models, "base")}
    assert legend == [*(f"{name} ({value:.3f})" for name, value in values.items()), "fine-tuned"]


def test_base_and_fine_tunes_are_lines_behind_their_row(tmp_path: Path) -> None:
    scores, averages = plot_scores(_evaluation(), tmp_path / "chart.png", title="t").axes
    upright = [
        line
        for line in scores.lines
        if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2
    ]
    base = [line for line in upright if line.get_color() == BASE_COLOUR]
    tuned = [line for line in upright if line.get_color() not in (BASE_COLOUR, "#E4E8EB")]
    assert [line.get_xdata()[0] for line in base] == list(VALUES["base"])
    assert [line.get_xdata()[0] for line in tuned] == list(TUNED.values())
    assert all(line.is_dashed() for line in base)
    assert not any(line.is_dashed() for line in tuned)
    for place, line in enumerate(base):
        assert place - 0.5 < line.get_ydata()[0] < line.get_ydata()[1] < place + 0.5
    (average,) = [line for line in averages.lines if list(line.get_xdata()) == [1, 1]]
    assert not average.is_dashed()


@pytest.mark.parametrize("count", [1, 2, 12])
def test_any_names_fit_in_the_chart(tmp_path: Path, count: int) -> None:
    tasks = [f"{name} {number}" for number, name in enumerate((*ADVERSARIAL, *ADVERSARIAL))][:count]
    values = {
        model: {task: 0.1 * number + 0.01 * place for place, task in enumerate(tasks)}
        for number, model in enumerate(("base", *ADVERSARIAL))
    }
    evaluation = evaluation_of(values, dict.fromkeys(tasks, 0.9))
    figure = plot_scores(evaluation, tmp_path / "chart.png", title=f"suite: {'W' * 150} and more")
    assert outside(figure) == []
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(legend)) == len(ADVERSARIAL) + 2
    assert any(text.startswith("base (") for text in legend)
    assert any("$x^2$" in text for text in legend)
    file = tmp_path / ("methods.pdf" if count == 1 else "methods.svg")
    assert outside(plot_methods(evaluation, file, title="W" * 300)) == []


def test_tasks_without_fine_tunes_have_no_average(tmp_path: Path) -> None:
    values = {name: dict(zip(TASKS, own, strict=True)) for name, own in VALUES.items()}
    figure = plot_scores(evaluation_of(values, {}), tmp_path / "chart.svg", title="t")
    assert len(figure.axes) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *list(VALUES)[1:],
        "base",
    ]


def test_methods_stand_by_their_average_the_best_on_top(tmp_path: Path) -> None:
    evaluation = _evaluation()
    figure = plot_methods(evaluation, tmp_path / "chart.png", title="Eight adapters")
    (axes,) = figure.axes
    values = {model: evaluation.normalised(model).value for model in evaluation.others}
    best_first = sorted(values, key=values.__getitem__, reverse=True)
    assert [label.get_text() for label in axes.get_yticklabels()] == best_first
    dots = [bars[0].get_xydata()[0] for bars in _errorbars(axes)]
    assert [x for x, _ in dots] == pytest.approx([values[model] for model in best_first])
    assert [y for _, y in dots] == [0, 1, 2, 3]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert "Eight adapters" in [text.get_text() for text in texts(figure)]
    assert not axes.findobj(PathCollection)


def test_the_suffix_gives_the_format_and_a_figure_appears_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(style._SETTINGS, "savefig.dpi", DPI)
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    for suffix, start in starts.items():
        file = tmp_path / f"chart{suffix}"
        figure = plot_scores(_evaluation(), file, title="t")
        content = file.read_bytes()
        assert content.startswith(start)
        plot_scores(_evaluation(), file, title="t")
        assert file.read_bytes() == content, "drawn twice, the same bytes"
    width, height = Image.open(tmp_path / "chart.png").size
    assert (width, height) == tuple((200 * figure.get_size_inches()).astype(int))
    assert b"/FontFile2" in (tmp_path / "chart.pdf").read_bytes()
    assert b"<text" not in (tmp_path / "chart.svg").read_bytes()
    with pytest.raises(UsageError, match=r"chart.bmp: a figure is written as \.png, \.pdf, \.svg"):
        plot_scores(_evaluation(), tmp_path / "chart.bmp", title="t")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted(starts)
