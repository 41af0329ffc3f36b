"""Whole evaluations on the real model."""

from pathlib import Path

import pytest

import starmerge as sm
from starmerge.demo.run import ADAPTERS
from starmerge.errors import UsageError
from starmerge.evaluation.runner import evaluate
from starmerge.evaluation.table import differences, markdown
from starmerge.evaluation.tasks import TASKS
from starmerge.study.figures import plot_scores


def test_scores_base_adapters_and_merges_on_the_same_rows(smollm2: Path, tmp_path: Path) -> None:
    adapters = {name: ADAPTERS / name for name in ("language", "sentiment")}
    merged = sm.merge(smollm2, adapters, output=tmp_path / "merged").path
    result = evaluate(
        smollm2,
        adapters | {"merged": merged, "copy": ADAPTERS / "language"},
        [TASKS["language"], TASKS["sentiment"]],
        rows=12,
    )
    assert list(result.scores) == ["base", "language", "sentiment", "merged", "copy"]
    assert list(result.scores["language"]) == ["language"]
    assert list(result.scores["merged"]) == ["language", "sentiment"]
    assert result.tuned["language"].right == result.scores["copy"]["language"].right
    assert result.tuned["language"].value > result.scores["base"]["language"].value
    average = result.normalised("merged")
    assert average is not None
    expected = sum(result.scores["merged"][t].value / result.tuned[t].value for t in adapters) / 2
    assert average.value == pytest.approx(expected)

    records = result.to_records()
    assert len(records) == 2 + 1 + 1 + 2 + 2
    assert all(record["n"] == 12 for record in records)
    assert [entry["model"] for entry in result.to_json()["normalised_averages"]] == [
        "base",
        "merged",
        "copy",
    ]

    table = markdown(result).splitlines()
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == [
        "task",
        "n",
        "base",
        "fine-tuned",
        "merged",
        "copy",
    ]
    assert len({len(line) for line in table}) == 1
    assert f"{average.value:.3f}" in table[-1]
    (sentence,) = differences(result)
    assert sentence.startswith("copy − merged: ")
    plot_scores(result, tmp_path / "chart.png", title="t")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_without_fine_tunes_there_is_no_normalised_average(smollm2: Path) -> None:
    result = evaluate(smollm2, {"x": ADAPTERS / "past"}, [TASKS["language"]], rows=4, scorer="rank")
    assert result.normalised("x") is None
    assert "normalised" not in markdown(result)
    assert differences(result) == []


def test_a_model_must_not_be_called_base(smollm2: Path) -> None:
    with pytest.raises(UsageError, match="NAME=PATH"):
        evaluate(smollm2, {"base": ADAPTERS / "past"}, [TASKS["language"]], rows=4)
