"""The figures of studies: what is drawn from a store's frames, and that it fits."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

from starmerge_models.errors import UsageError
from starmerge_models.study.figures import (
    plot_against_number,
    plot_against_parameter,
    plot_best_parameter,
    plot_grid,
    plot_heat_map,
)
from starmerge_models.study.palette import BASE_COLOUR, plot_styles
from tests.study.drawn import ADVERSARIAL, frames, outside

NUMBERS = (2, 4, 8)
METHODS = ("star", "auto", "ties:k=20")
BY_NUMBER = frames(
    [
        (label, {}, n, [0.9 - 0.1 * place - 0.03 * n, 1.0 - 0.1 * place - 0.03 * n])
        for place, label in enumerate(METHODS)
        for n in NUMBERS
    ]
)
ETAS = (10, 40, 90)
SWEEP = {  # the best η: 90 for two models, 40 for eight
    2: (0.80, 0.84, 0.85),
    8: (0.50, 0.60, 0.40),
}
BY_ETA = frames(
    [
        ("star", {"eta": eta}, n, [value])
        for n, values in SWEEP.items()
        for eta, value in zip(ETAS, values, strict=True)
    ]
)


def _curves(axes) -> list[ErrorbarContainer]:
    return [one for one in axes.containers if isinstance(one, ErrorbarContainer)]


def _legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_averages_stand_against_the_number_of_models(tmp_path: Path) -> None:
    averages, runs = BY_NUMBER
    figure = plot_against_number(averages, tmp_path / "a.png", title="Figure 1", runs=runs)
    (axes,) = figure.axes
    assert _legend(figure) == [*METHODS, "base", "fine-tunes"]
    for label, (line, _, (interval,)) in zip(METHODS, _curves(axes), strict=True):
        own = averages[averages.label == label]
        assert line.get_xdata() == pytest.approx(list(NUMBERS), abs=0.3)
        assert line.get_ydata() == pytest.approx(own.value.to_list())
        assert line.get_color() == plot_styles(METHODS)[label].colour
        ends = [segment[:, 1] for segment in interval.get_segments()]
        assert np.array(ends) == pytest.approx(own[["low", "high"]].to_numpy())
        single = next(
            other
            for other in axes.lines
            if other is not line and other.get_color() == line.get_color()
        )
        assert single.get_linestyle() == "None"
        assert single.get_ydata() == pytest.approx(runs[runs.label == label].value.to_list())
    (base,) = [line for line in axes.lines if line.get_color() == BASE_COLOUR]
    assert base.is_dashed()
    assert list(base.get_xdata()) == list(NUMBERS)
    assert base.get_ydata() == pytest.approx([0.3] * 3), "the mean over the two combinations"
    assert any(list(line.get_ydata()) == [1, 1] for line in axes.lines), "the fine-tunes"
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["2", "4", "8"]


def test_a_wide_span_of_numbers_has_a_logarithmic_scale(tmp_path: Path) -> None:
    averages, _ = frames([("star", {}, n, [0.5]) for n in (2, 10, 50)])
    figure = plot_against_number(averages, tmp_path / "a.pdf", title="t")
    assert figure.axes[0].get_xscale() == "log"
    assert _legend(figure) == ["star", "fine-tunes"]


def test_one_method_has_a_curve_for_each_number_of_models(tmp_path: Path) -> None:
    averages, runs = BY_ETA
    figure = plot_against_parameter(averages, "eta", tmp_path / "a.png", title="t", runs=runs)
    (axes,) = figure.axes
    assert _legend(figure) == ["n = 2", "n = 8", "base", "fine-tunes"]
    for (line, _, _), values in zip(_curves(axes), SWEEP.values(), strict=True):
        assert line.get_xdata() == pytest.approx(list(ETAS), abs=0.4 * min(np.diff(ETAS)))
        assert line.get_ydata() == pytest.approx(values)
    assert len({line.get_color() for line, _, _ in _curves(axes)}) == 2
    assert axes.get_xlabel() == "eta"


def test_several_methods_have_a_panel_for_each_number_of_models(tmp_path: Path) -> None:
    more, _ = frames(
        [("ties", {"eta": eta, "k": 20}, n, [0.3]) for n in (2, 8) for eta in (10, 90)]
    )
    none, _ = frames([("average", {}, 2, [0.4])])
    averages = pd.concat([BY_ETA[0], more, none])
    figure = plot_against_parameter(averages, "eta", tmp_path / "a.png", title="t")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["n = 2", "n = 8"]
    for axes, values in zip(figure.axes, SWEEP.values(), strict=True):
        star, ties = _curves(axes)
        assert star[0].get_ydata() == pytest.approx(values)
        assert ties[0].get_xdata() == pytest.approx([10, 90], abs=0.4 * min(np.diff(ETAS)))
        # Intervals at one value do not hide each other.
        assert not set(star[0].get_xdata()) & set(ties[0].get_xdata())
    assert _legend(figure) == ["star", "ties", "fine-tunes"]


def test_the_best_value_has_the_interval_that_resamples_give_it(tmp_path: Path) -> None:
    best = pd.DataFrame(
        {
            "label": ["star", "star", "ties"],
            "n": [2, 8, 8],
            "best": [90.0, 40.0, 20.0],
            "low": [40.0, 40.0, 10.0],
            "high": [90.0, 60.0, 20.0],
        }
    )
    figure = plot_best_parameter(best, "eta", tmp_path / "a.png", title="t")
    (line, _, (bars,)), (other, _, _) = _curves(figure.axes[0])
    assert line.get_ydata().tolist() == [90, 40]
    assert line.get_xdata().tolist() == pytest.approx([2, 8], abs=0.5)
    assert other.get_ydata().tolist() == [20]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[40, 90], [40, 60]]
    with pytest.raises(UsageError, match="several values of 'k'"):
        plot_best_parameter(best[:0], "k", tmp_path / "b.png", title="t")


def test_a_grid_stands_beside_the_setting_without_a_search(tmp_path: Path) -> None:
    figure = plot_grid(BY_ETA[0], {"star": {"eta": 40}}, tmp_path / "a.png", title="t")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["star, n = 2", "star, n = 8"]
    assert [line.get_xydata()[0].tolist() for line, _, _ in _curves(axes)] == [
        pytest.approx([0.84, 0]),
        pytest.approx([0.6, 1]),
    ]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert [line.get_xdata()[0] for line in hollow] == pytest.approx([0.85, 0.6])


def test_a_heat_map_has_a_cell_for_each_pair(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "task": ["past", "past", "pos"],
            "label": ["star", "auto", "star"],
            "value": [0.25, 0.5, 0.125],
        }
    )
    axes, _ = plot_heat_map(frame, tmp_path / "a.svg", title="t").axes
    cells = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert np.array_equal(cells, [[0.25, 0.5], [0.125, np.nan]], equal_nan=True)
    assert [text.get_text() for text in axes.texts] == ["0.25", "0.50", "0.12"]
    with pytest.raises(UsageError, match="past, star: there are two"):
        plot_heat_map(pd.concat([frame, frame]), tmp_path / "b.svg", title="t")


def test_any_names_fit_in_the_figures(tmp_path: Path) -> None:
    labels = ADVERSARIAL
    settings = [
        (label, {"W" * 80: eta, "eta": eta}, n, [0.5 + 0.001 * eta])
        for label in labels
        for n in (2, 3)
        for eta in ETAS
    ]
    averages, runs = frames(settings)
    title = f"{'W' * 90} {ADVERSARIAL[0]}"
    by_number = averages.groupby(["label", "n"], sort=False).first().reset_index()
    file = tmp_path / "a.png"
    drawn = [
        plot_against_number(by_number, file, title=title, runs=runs),
        plot_against_parameter(averages, "W" * 80, file, title=title, runs=runs),
        plot_best_parameter(
            by_number.assign(best=1.0, low=0.5, high=2.0), "W" * 80, file, title=title
        ),
        plot_grid(averages, {}, file, title=title),
        plot_heat_map(
            averages.drop_duplicates("label"), file, title=title, rows="label", columns="label"
        ),
    ]
    assert [outside(figure) for figure in drawn] == [[]] * 5


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    averages, _ = BY_ETA
    file = tmp_path / "a.png"
    with pytest.raises(UsageError, match="No run has the parameter 'k' as a number.* have eta"):
        plot_against_parameter(averages, "k", file, title="t")
    with pytest.raises(UsageError, match="star, 2: there are two averages for this number"):
        plot_against_number(averages, file, title="t")
    with pytest.raises(UsageError, match="nothing to draw"):
        plot_against_number(averages.iloc[:0], file, title="t")
    assert not file.exists()
