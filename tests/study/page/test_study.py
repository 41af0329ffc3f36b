"""The page of a study, drawn from a written store."""

import pytest

from starmerge_models.study.averages import Averages
from starmerge_models.study.frames import by_number, shares_by_task
from starmerge_models.study.page import Chart, Copy, KeyFigures, Notes, Page, Provenance
from starmerge_models.study.page.page import html
from starmerge_models.study.page.study import study_page
from starmerge_models.study.store import Store
from tests.study.page.shown import drawn, parts_of, table_of
from tests.study.studies import written_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return written_store(tmp_path_factory.mktemp("study") / "s")[1]


@pytest.fixture(scope="module")
def page(store: Store) -> Page:
    return study_page(Averages(store))


def test_a_study_has_a_section_for_each_of_its_figures(store: Store, page: Page) -> None:
    assert page.title == "Study: written"
    assert page.subtitle == "12 merges of 4 fine-tunes of org/base, on 4 tasks."
    assert [section.title for section in page.sections] == [
        "Summary", "By number of models", "By eta", "The best eta", "Without a search",
        "Task by task", "Averages", "Best of the grids", "All runs", "How to read this",
    ]  # fmt: skip
    assert [chart.caption for chart in parts_of(page, Chart)] == [
        "By number",
        "Sensitivity to eta: 4 fine-tunes of org/base",
        "The best eta against the number of models: 4 fine-tunes of org/base",
        "Without a search, and the best of a grid: 4 fine-tunes of org/base",
        "Share of the fine-tune's score that is kept: 4 fine-tunes of org/base",
    ]
    assert str(store.folder) not in html(page)


def test_the_summary_has_the_best_of_the_most_models(store: Store, page: Page) -> None:
    averages = Averages(store)
    whole = {run.label: run.value for run in averages.runs if run.n == 4}
    best = sorted(whole, key=whole.__getitem__, reverse=True)
    (keys,) = parts_of(page, KeyFigures)
    assert [key.label for key in keys.figures] == [*best, "base"]
    assert [key.value for key in keys.figures[:-1]] == [f"{whole[label]:.3f}" for label in best]
    first = parts_of(page, Notes)[0].lines
    assert [line.partition(":")[0] for line in first if "paired" in line] == [
        f"{best[0]} − {other}".partition(":")[0] for other in best[1:3]
    ]


def test_charts_and_tables_have_the_averages(store: Store, page: Page) -> None:
    averages = Averages(store)
    number, eta, best, one_shot, tasks = (part.chart for part in parts_of(page, Chart))
    means, runs = by_number(averages, ("average",))
    assert [(p["label"], p["n"], p["value"]) for p in drawn(number, "point")] == [
        (row.label, row.n, row.value) for row in means.itertuples()
    ]
    assert len(drawn(number, "circle")) == len(runs) == 3
    points = {(p["series"], p["x"]) for p in drawn(eta, "point")}
    assert points == {(f"n = {n}", value) for n in (2, 4) for value in (20, 40, 60)}
    assert {p["row"] for p in drawn(best, "point")} == {"n = 2", "n = 4"}
    assert {(p["row"], p["label"]) for p in drawn(one_shot, "point")} == {
        (method, label)
        for method in ("average", "star")
        for label in ("default", "best of the grid")
    }
    shares = shares_by_task(averages, None)
    assert [c["value"] for c in drawn(tasks, "rect")] == pytest.approx(list(shares.share))
    assert len(table_of(page, "Normalised averages").frame) == len(averages.to_frame())
    assert len(table_of(page, "Every run").frame) == len(store.to_frame())
    (grid,) = table_of(page, "The defaults and").rows[:1]
    assert [cell.text for cell in grid[:3]] == ["star", "2", "3"]


def test_the_best_merge_is_there_to_copy(store: Store, page: Page) -> None:
    whole = [run for run in Averages(store).runs if run.n == 4]
    best = max(whole, key=lambda run: run.value).record.run
    (copy,) = parts_of(page, Copy)
    eta = best.parameters.get("eta", 40)
    settings = "" if eta == 40 else f" -p eta={eta}"
    assert copy.text == f"starmerge merge BASE MODEL... -m {best.method}{settings} -o merged"
    assert parts_of(page, Provenance)[0].content["code"] == "dd"
