"""Figures of an inspection: what is drawn, and that it fits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import starmerge_models as sm
from starmerge_models.study.figures.inspection import (
    plot_conflicts,
    plot_kept,
    plot_ranks,
    plot_spectra,
    plots_of,
)
from starmerge_models.study.palette import plot_styles
from tests.study.drawn import ADVERSARIAL, outside
from tests.study.inspection.adapters import renamed, write_adapters

NAMES = ["one", "two", "three"]


@pytest.fixture(scope="module")
def found(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> sm.Inspection:
    models = write_adapters(tmp_path_factory.mktemp("adapters"), tiny_base)
    return sm.inspect(tiny_base, models, eta=90, methods=["average", "star"])


def _cells(axes) -> np.ndarray:
    return np.ma.filled(axes.images[0].get_array(), np.nan)


def test_the_rank_map_has_a_panel_for_each_model(found: sm.Inspection, tmp_path: Path) -> None:
    *panels, _ = plot_ranks(found, tmp_path / "a.png").axes
    assert [axes.get_title(loc="left") for axes in panels] == NAMES
    tensors = found.to_frame("tensors")
    modules = [label.get_text() for label in panels[0].get_xticklabels()]
    assert set(modules) == {"q_proj", "v_proj", "up_proj", "down_proj"}
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0", "1"]
    for name, axes in zip(NAMES, panels, strict=True):
        own = tensors[tensors["model"] == name]
        table = own.pivot(index="layer", columns="module", values="kept")
        np.testing.assert_array_equal(_cells(axes), table.reindex(columns=modules))
    assert len({axes.images[0].get_clim() for axes in panels}) == 1


def test_spectra_are_means_over_the_matrices_of_a_module(
    found: sm.Inspection, tmp_path: Path
) -> None:
    figure = plot_spectra(found, tmp_path / "a.png")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*NAMES, "η = 90"]
    spectra = found.to_frame("spectra")
    seen = 0
    for axes in figure.axes:
        for line in axes.lines:
            name = next(
                (n for n, look in plot_styles(NAMES).items() if line.get_color() == look.colour),
                None,
            )
            if name is None:
                assert list(line.get_ydata()) == [90, 90]
                continue
            own = spectra[(spectra.module == axes.get_title(loc="left")) & (spectra.model == name)]
            rank = own["index"].max()
            by_tensor = [list(part) for _, part in own.groupby("tensor")["cumulative"]]
            assert [len(part) for part in by_tensor] == [rank] * 2
            assert line.get_ydata() == pytest.approx([0, *(100 * np.mean(by_tensor, axis=0))])
            assert list(line.get_xdata()) == list(range(rank + 1))
            seen += 1
    assert seen == 2 + 2 + 4


def test_conflicts_have_a_matrix_for_each_measure(found: sm.Inspection, tmp_path: Path) -> None:
    figure = plot_conflicts(found, tmp_path / "a.png")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.images}
    keys = {
        "Cosine of the task vectors": ("cosine", "cosine"),
        "Row's answer to the column's inputs": ("a_on_b", "b_on_a"),
        "Overlap of inputs": ("overlap_in", "overlap_in"),
        "Overlap of outputs": ("overlap_out", "overlap_out"),
        "Row acting on the column's subspace": ("a_acting_on_b", "b_acting_on_a"),
        "Sign conflict": ("sign_conflict", "sign_conflict"),
    }
    assert list(panels) == list(keys)
    for title, (forth, back) in keys.items():
        cells = np.full((3, 3), np.nan)
        for pair in found.conflicts:
            i, j = NAMES.index(pair["a"]), NAMES.index(pair["b"])
            cells[i, j], cells[j, i] = pair[forth], pair[back]
        np.testing.assert_array_equal(_cells(panels[title]), cells)
        written = [text.get_text() for text in panels[title].texts]
        assert written == [f"{value:.2f}" for value in cells[~np.isnan(cells)]]
    low, high = panels["Cosine of the task vectors"].images[0].get_clim()
    assert low == -high


def test_dots_stand_at_what_merges_keep(found: sm.Inspection, tmp_path: Path) -> None:
    figure = plot_kept(found, tmp_path / "a.png")
    kept = found.to_frame("kept")
    for axes, column in zip(figure.axes, ("own", "others"), strict=True):
        for merge, look in plot_styles(["average", "star"]).items():
            (dots,) = [line for line in axes.lines if line.get_color() == look.colour]
            assert list(dots.get_xdata()) == kept[kept["merge"] == merge][column].to_list()
            assert [round(height) for height in dots.get_ydata()] == [0, 1, 2]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == NAMES


def _many(found: sm.Inspection, names: Sequence[str]) -> sm.Inspection:
    """Return an inspection with the first model under many names."""
    pair = next(pair for pair in found.conflicts if pair["a"] == "one")
    conflicts = [pair | {"a": a, "b": b} for number, a in enumerate(names) for b in names[:number]]
    changed = {
        table: [
            record | {"model": name}
            for name in names
            for record in getattr(found, table)
            if record["model"] == "one"
        ]
        for table in ("models", "tensors", "kept")
    }
    return replace(found, **changed, conflicts=conflicts)


def test_any_names_and_many_models_fit(found: sm.Inspection, tmp_path: Path) -> None:
    evil = dict(zip([*NAMES, "average", "star"], ADVERSARIAL, strict=False))
    evil |= {"q_proj": "W" * 90, "base": f"organisation/{'W' * 120}"}
    for case in (renamed(found, evil), _many(found, [f"{'model ' * 9}{n}" for n in range(17)])):
        plots = plots_of(case)
        assert list(plots) == ["ranks", "spectra", "conflicts", "kept"]
        for name, plot in plots.items():
            figure = plot(case, tmp_path / f"{name}.png")
            assert outside(figure) == [], name
    means = plot_ranks(case, tmp_path / "a.svg").axes
    assert [axes.get_title(loc="left") for axes in means] == ["mean of 17 models", ""]


def test_one_model_without_a_merge_has_ranks_and_spectra_alone(
    tiny_base: Path, tmp_path: Path
) -> None:
    models = write_adapters(tmp_path, tiny_base)
    found = sm.inspect(tiny_base, {"one": models["one"]})
    assert list(plots_of(found)) == ["ranks", "spectra"]
    assert "1 model of base" in plot_ranks(found, tmp_path / "a.png").get_suptitle()
