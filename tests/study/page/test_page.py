"""Pages without a browser: what stands in them, and how their files appear."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from starmerge_models.errors import UsageError
from starmerge_models.study.page import (
    Chart,
    Copy,
    Page,
    Provenance,
    Section,
    Table,
    Text,
    check_page,
    write_page,
)
from starmerge_models.study.page.charts import curves, dots, heat_map, specification
from starmerge_models.study.page.choice import choice_page
from starmerge_models.study.page.evaluation import evaluation_page
from starmerge_models.study.page.page import html
from starmerge_models.study.palette import plot_styles
from tests.study.drawn import choice, evaluation_of, frames
from tests.study.page.shown import drawn, layers_of, parts_of, table_of

TASKS = ("past", "pos")
VALUES = {"base": (0.1, 0.2), "star": (0.5, 0.6), "auto": (0.9, 0.7)}


def _evaluation(*, tuned=True, models=tuple(VALUES)):
    values = {name: dict(zip(TASKS, VALUES[name], strict=True)) for name in models}
    return evaluation_of(values, dict.fromkeys(TASKS, 0.9) if tuned else {})


def test_a_page_appears_whole_and_replaces_nothing_by_itself(tmp_path: Path) -> None:
    page = Page("A", "B", [Section("C", [Text("D")])])
    file = tmp_path / "deep" / "page.html"
    check_page(file, overwrite=False)
    write_page(page, file)
    written = file.read_text(encoding="utf-8")
    assert written.startswith("<!DOCTYPE html>")
    with pytest.raises(UsageError, match="exists"):
        check_page(file, overwrite=False)
    with pytest.raises(UsageError, match=r"ends in \.html"):
        check_page(tmp_path / "page.txt", overwrite=False)
    broken = Page("A", "B", [Section("C", [Chart(None, "", "")])])  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        write_page(broken, file, overwrite=True)
    assert file.read_text(encoding="utf-8") == written
    write_page(replace(page, title="E \udce4"), file, overwrite=True)
    assert "<title>E ?</title>" in file.read_text(encoding="utf-8")
    assert list(file.parent.iterdir()) == [file]


def test_cells_show_numbers_and_are_sorted_by_them() -> None:
    frame = pd.DataFrame(
        {"name": ["a", "b"], "value": [0.12345, math.nan], "low": [0.1, math.nan]}
        | {"high": [0.2, math.nan], "count": [3, 12], "share": [-0.5, 1.0], "odd": ["x", None]}
    )
    table = Table(
        frame, "c", intervals={"value": ("low", "high")}, formats={"share": "+.0%"},
        titles={"odd": "even"},
    )  # fmt: skip
    assert table.columns == ["name", "value", "count", "share", "odd"]
    assert [table.title(column) for column in table.columns][-1] == "even"
    texts = [[cell.text for cell in row] for row in table.rows]
    assert texts == [
        ["a", "0.123 [0.100, 0.200]", "3", "−50%", "x"],
        ["b", "–", "12", "+100%", "–"],
    ]
    assert [cell.order for cell in table.rows[0]] == [None, 0.12345, 3, -0.5, None]
    assert table.numeric == [False, True, True, True, False]


def test_provenance_is_a_line_for_each_value() -> None:
    content = {"a": {"b": [1, 2], "c": None}, "d": [{"e": "f"}, {"e": "g"}], "h": {}, "i": []}
    assert Provenance(content).lines == [
        ("a.b", "1, 2"), ("a.c", "–"), ("d.1.e", "f"), ("d.2.e", "g"), ("h", "–"), ("i", "–"),
    ]  # fmt: skip


def test_text_is_markdown_without_html_and_links() -> None:
    text = "*so* `x<y` <b>no</b> [a](javascript:b) ![c](d)"
    page = html(Page("t", "s", [Section("c", [Text(text)])]))
    assert "<p><em>so</em> <code>x&lt;y</code> &lt;b&gt;no&lt;/b&gt; [a](javascript:b) ![c]" in page


def test_an_evaluation_has_its_numbers_on_its_page() -> None:
    evaluation = _evaluation()
    page = evaluation_page(evaluation, title="t", remarks=["as published"], commands={"do": "it"})
    assert [section.title for section in page.sections] == [
        "Summary", "Averages", "Task by task", "Differences", "Answers", "All numbers",
        "How to read this",
    ]  # fmt: skip
    scores = table_of(page, "Scores by task")
    assert [scores.title(column) for column in scores.columns] == [
        "task", "base", "fine-tuned", "star", "auto",
    ]  # fmt: skip
    for row, task in zip(scores.rows, TASKS, strict=True):
        expected = [evaluation.scores[model][task].value for model in ("base", "star", "auto")]
        assert [cell.order for cell in row] == [None, expected[0], 0.9, *expected[1:]]
    differences = table_of(page, "Paired differences").frame
    found = evaluation.difference("auto", "star")
    assert found is not None
    assert differences.iloc[0].difference == found.value
    assert list(differences.models.unique()) == ["auto − star"]
    answers = table_of(page, "Answers")
    assert len(answers.rows) == 40
    assert {row[0].text for row in answers.rows} == set(TASKS)
    right = [row for row in answers.rows if row[4].text.startswith("✓")]
    assert len(right) == round(20 * 0.5) + round(20 * 0.6)
    assert len(table_of(page, "Every score").rows) == 2 * 3 + 2
    assert "as published" in str(page)
    assert [copy.text for copy in parts_of(page, Copy)] == ["it"]
    (provenance,) = parts_of(page, Provenance)
    assert provenance.lines == [("scorer", "generate"), ("matching", "strict")]
    dotted = parts_of(page, Chart)[1]
    merged = [row for one in layers_of(dotted) for row in one["data"]["values"]]
    assert {(row["row"], row["label"]) for row in merged} == {
        (task, model) for task in TASKS for model in (*VALUES, "fine-tuned")
    }


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize("models", [("base",), ("base", "star"), tuple(VALUES)])
def test_small_evaluations_have_a_page_too(tuned: bool, models: tuple[str, ...]) -> None:
    page = evaluation_page(_evaluation(tuned=tuned, models=models), title="t")
    titles = [section.title for section in page.sections]
    assert ("Averages" in titles) == (tuned and len(models) > 1)
    assert ("Differences" in titles) == (len(models) > 2)
    assert html(page).count("<h2 id=") == len(titles)


def test_undefined_scores_are_left_out_of_charts() -> None:
    evaluation = _evaluation()
    nan = replace(evaluation.scores["star"]["past"], value=math.nan, low=math.nan, high=math.nan)
    scores = dict(evaluation.scores) | {"star": {"past": nan, "pos": nan}}
    page = evaluation_page(replace(evaluation, scores=scores), title="t")
    labels = {
        row["label"]
        for one in layers_of(parts_of(page, Chart)[1])
        for row in one["data"]["values"]
        if "label" in row
    }
    assert labels == {"base", "auto", "fine-tuned"}
    assert "NaN" not in html(page).rpartition('id="charts">')[2].partition("</script>")[0]


def test_many_models_are_told_by_their_best() -> None:
    values = {"base": 0.1} | {f"m{n}": 0.2 + 0.05 * n for n in range(6)}
    evaluation = evaluation_of(
        {model: dict.fromkeys(TASKS, value) for model, value in values.items()},
        dict.fromkeys(TASKS, 0.9),
    )
    page = evaluation_page(evaluation, title="t")
    lines = page.sections[0].parts[1].lines
    assert len(lines) == 5
    assert all("m5 − m" in line for line in lines)
    pairs = drawn(parts_of(page, Chart)[-1].chart, "point")
    assert len(pairs) == 15
    assert all(row["row"] == row["label"] for row in pairs)


def test_curves_are_drawn_from_the_frames() -> None:
    averages, runs = frames(
        [(label, {"eta": eta}, n, [0.5 + 0.001 * eta, 0.6]) for label in ("star", "ties")
         for n in (2, 4) for eta in (10, 40)]
    )  # fmt: skip
    one = averages[(averages.parameters.map(lambda own: own["eta"]) == 10)]
    by_number = curves(one, runs=runs)
    points = drawn(by_number, "point")
    assert [(p["label"], p["x"], p["value"]) for p in points] == [
        (row.label, row.n, row.value) for row in one.itertuples()
    ]
    assert len(drawn(by_number, "circle")) == len(runs)
    layers = layers_of(Chart(by_number, "", ""))
    base = next(one for one in layers if one["mark"].get("strokeDash") == [4, 3])
    assert base["data"]["values"] == [{"n": n, "value": pytest.approx(0.3)} for n in (2, 4)]
    colours = next(one for one in layers if one["mark"]["type"] == "point")["encoding"]["color"]
    shown = plot_styles(["star", "ties"])
    assert colours["scale"] == {
        "domain": ["star", "ties"],
        "range": [look.colour for look in shown.values()],
    }
    chosen = specification(Chart(curves(averages, "eta", runs=runs), "", ""))
    lists = [one["bind"] for one in chosen["params"] if isinstance(one.get("bind"), dict)]
    assert [one["options"] for one in lists] == [[2, 4]]
    star = averages[averages.label == "star"]
    assert {p["series"] for p in drawn(curves(star, "eta"), "point")} == {"n = 2", "n = 4"}
    with pytest.raises(UsageError, match="'k'"):
        curves(averages, "k")
    with pytest.raises(UsageError, match="star, n = 2: there are two averages for n = 2"):
        curves(averages)


def test_frames_of_any_column_names_are_drawn() -> None:
    frame = pd.DataFrame({"a.b[0]": ["r"], "x": ["c"], "it's": [0.5], "layer": [3]})
    (cell,) = drawn(heat_map(frame, "x", "a.b[0]", "it's"), "rect")
    assert cell == {"x": "c", "y": "r", "value": 0.5, "layer": 3}
    with pytest.raises(UsageError, match="no numbers"):
        dots(pd.DataFrame({"row": [], "label": [], "value": [], "low": [], "high": []}))


def test_a_choice_has_its_race_and_its_recipe_on_its_page() -> None:
    made = choice()
    page = choice_page(made, title="t")
    rows = table_of(page, "Candidates").rows
    assert [[cell.text for cell in row] for row in rows] == [
        ["auto", "✓", "2", "16", "0.700 [0.600, 0.800]", "–", "–"],
        ["star", "", "1", "8", "0.500 [0.400, 0.600]", "−0.100 [−0.200, −0.050]", "clearly behind"],
    ]
    rounds = [[cell.text for cell in row] for row in table_of(page, "Averages after").rows]
    assert [row[:2] for row in rounds] == [
        ["round 1", "auto"], ["round 1", "star"], ["round 2", "auto"],
    ]  # fmt: skip
    assert parts_of(page, Copy)[0].text == made.recipe.to_yaml()
    text = html(page)
    for said in ("A note.", "Left out: iso_c. It cannot.", "auto is clearly better"):
        assert said in text
