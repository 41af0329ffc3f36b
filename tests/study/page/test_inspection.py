"""The page of an inspection, without a browser."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import starmerge_models as sm
from starmerge_models.cli import app
from starmerge_models.errors import UsageError
from starmerge_models.study.page import Chart, Copy, KeyFigures, Notes, Provenance, Text
from starmerge_models.study.page.inspection import TENSORS, inspection_page
from starmerge_models.study.page.page import html
from tests.study.inspection.adapters import renamed, scaled, write_adapters
from tests.study.page.shown import drawn, layers_of, parts_of, table_of

RANKS = "Rank that STAR keeps at η = 90"
SPECTRA = "Share of the nuclear norm in the first singular values"
EVIL = "<img src=x onerror=alert(1)>'$(rm)`"


@pytest.fixture(scope="module")
def models(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"), tiny_base)


@pytest.fixture(scope="module")
def found(tiny_base: Path, models: dict[str, Path]) -> sm.Inspection:
    return sm.inspect(tiny_base, models, eta=90, methods=["average", "star"])


def _charts(page) -> dict[str, Chart]:
    return {chart.caption: chart for chart in parts_of(page, Chart)}


def test_a_page_has_what_was_found(found: sm.Inspection) -> None:
    page = inspection_page(found)
    assert page.title == "3 task vectors of base"
    assert [section.title for section in page.sections] == [
        "Summary", "Models", "Rank map", "Spectra", "Conflicts", "Layers", "What merges keep",
        "All tensors", "How to read this",
    ]  # fmt: skip
    models = {record["model"]: record for record in found.models}
    (keys,) = parts_of(page, KeyFigures)
    assert {key.label: key.value for key in keys.figures} == {
        name: f"{record['norm']:.3g}" for name, record in models.items()
    }
    said = parts_of(page, Notes)[0].lines
    assert said == [str(finding) for finding in found.findings]
    commands = [copy.text for copy in parts_of(page, Copy)]
    options = {f.options for f in found.findings if f.options}
    assert options
    assert commands[:-1] == [
        f"starmerge merge BASE MODEL... {option} -o merged"
        for option in dict.fromkeys(f.options for f in found.findings if f.options)
    ]
    for table, caption in (
        ("models", "Task vectors"), ("conflicts", "Pairs"),
        ("kept", "What merges keep"), ("tensors", "Every tensor"),
    ):  # fmt: skip
        assert len(table_of(page, caption).frame) == len(found.to_frame(table))
    shared = [record for record in found.layers if record["conflict"] is not None]
    assert len(table_of(page, "Layers").frame) == len(shared)
    content = parts_of(page, Provenance)[0].content
    assert content["models"] == dict.fromkeys(models, "LoRA adapter")
    assert content["merges"] == ["average", "star"]


def test_charts_are_drawn_from_the_tables(found: sm.Inspection) -> None:
    charts = _charts(inspection_page(found))
    ranks = drawn(charts[RANKS].chart, "rect")
    tensors = found.to_frame("tensors")
    assert {(r["choice"], r["y"], r["x"]): r["value"] for r in ranks} == {
        (row.model, str(row.layer), row.module): row.kept for row in tensors.itertuples()
    }
    curves = drawn(charts[SPECTRA].chart, "line")
    assert curves[0] == {"label": "one", "x": 0, "value": 0, "choice": "all modules"}
    ends = {(row["label"], row["choice"]): row["value"] for row in curves}
    assert ends == pytest.approx(dict.fromkeys(ends, 1.0))
    assert len(ends) == (2 + 1) + (2 + 1) + (4 + 1)
    answers = drawn(charts["Row's answer to the column's inputs"].chart, "rect")
    expected = {(p["a"], p["b"]): p["a_on_b"] for p in found.conflicts}
    expected |= {(p["b"], p["a"]): p["b_on_a"] for p in found.conflicts}
    assert {(row["y"], row["x"]): row["value"] for row in answers} == pytest.approx(expected)
    layers = drawn(charts["Where tasks clash"].chart, "rect")
    known = [record for record in found.layers if record["conflict"] is not None]
    assert len(layers) == len(known) < len(found.layers)
    own = drawn(charts["How much of each task a merge keeps"].chart, "point")
    assert [row["value"] for row in own] == [record["own"] for record in found.kept]
    cosine = layers_of(charts["Cosine of the task vectors"])[0]["encoding"]
    ends = cosine["color"]["scale"]["domain"]
    assert ends == [-end for end in reversed(ends)]
    assert cosine["x"]["sort"] == cosine["y"]["sort"] == ["one", "two", "three"]


def test_models_without_layers_have_one_row_in_the_maps(found: sm.Inspection) -> None:
    bare = {
        table: [record | {"layer": None} for record in getattr(found, table)]
        for table in ("tensors", "layers")
    }
    charts = _charts(inspection_page(replace(found, **bare)))
    assert {cell["y"] for cell in drawn(charts[RANKS].chart, "rect")} == {"–"}


def test_names_are_text_whatever_they_hold(found: sm.Inspection) -> None:
    names = dict.fromkeys(("one", "average", "q_proj", "base"), EVIL)
    page = inspection_page(renamed(found, names))
    text = html(page)
    assert "<img" not in text.partition("<script")[0]
    assert EVIL not in text
    assert not any(EVIL in part.markdown for part in parts_of(page, Text))


def test_names_in_commands_are_quoted_for_a_shell(
    tiny_base: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    large = scaled(shutil.copytree(models["one"], tmp_path / "large"), 8)
    found = sm.inspect(tiny_base, {"it's; a": large, "two": models["two"]}, methods=["average"])
    commands = [shlex.split(copy.text) for copy in parts_of(inspection_page(found), Copy)]
    (weight,) = [command[command.index("-w") + 1] for command in commands if "-w" in command]
    assert weight == "it's; a=0.12"


def test_of_many_models_a_page_shows_means_and_the_largest_tensors(found: sm.Inspection) -> None:
    names = [f"m{number}" for number in range(400)]
    tensors = [
        record | {"model": name, "norm": record["norm"] * (1 + number)}
        for number, name in enumerate(names)
        for record in found.tensors
        if record["model"] == "one"
    ]
    models = [found.models[0] | {"model": name} for name in names]
    page = inspection_page(replace(found, models=models, tensors=tensors, kept=[], conflicts=[]))
    assert [section.title for section in page.sections][-2:] == ["All tensors", "How to read this"]
    assert f"The first {TENSORS} of 1600 rows" in page.sections[-2].parts[0].markdown
    frame: pd.DataFrame = table_of(page, "Every tensor").frame
    assert len(frame) == TENSORS
    assert "m0" not in set(frame["model"])
    charts = _charts(page)
    (model,) = {row["label"] for row in drawn(charts[SPECTRA].chart, "line")}
    assert model == "mean of 400 models"
    assert "choice" not in drawn(charts[RANKS].chart, "rect")[0]
    assert len(html(page)) < 5_000_000


def test_the_command_ends_in_a_page(
    tiny_base: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> None:
        app(list(map(str, ("inspect", *arguments))), standalone_mode=False)

    with pytest.raises(UsageError, match=r"ends in \.html"):
        run("no/such", "a", "--report", tmp_path / "report.pdf")
    file = tmp_path / "report.html"
    run(tiny_base, models["one"], models["two"], "-m", "average", "--report", file)
    assert f"Report: {file}" in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert "<title>2 task vectors of base</title>" in text
    assert str(tiny_base.parent) not in text
    with pytest.raises(UsageError, match="exists"):
        run("no/such", "a", "--report", file)
