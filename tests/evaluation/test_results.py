"""The results folder: what pandas reads is what was written, and nothing else is replaced."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.results import check_results, load_results, write_results
from starmerge_models.evaluation.scoring.metrics import Prediction, score

TABLE = "| task | base |\n|------|------|\n| NA   | 0.50 |"
FORMATS = ["parquet", "jsonl"]
PREDICTIONS = (
    Prediction("test/0", 'an "even"\nnumber\r\n', "even", "even", 1.0),
    Prediction("test/1", "null", None, "odd", 0.0, shortened=True),
    Prediction("17", "ungerade \u2028 ß 四", "odd", "even", 0.0),
    Prediction("2024-01-01", "", "None", "odd", 1.0),
)
NUMBERS = (
    Prediction("test/0", "3.5", 3.5, "4", None),
    Prediction("test/1", "0.1", 0.1, "1e-3", None),
    Prediction("test/2", "none", None, "2", None),
)


def _evaluation(predictions: tuple[Prediction, ...] = PREDICTIONS) -> Evaluation:
    """Return scores with a correlation that is undefined, and names that look like other things."""
    scores = {"NA": score(predictions, "accuracy"), "1": score(NUMBERS, "pearson")}
    models = dict.fromkeys(["base", "007", "nan"], scores)
    return Evaluation("generate", "strict", models, {})


@pytest.mark.parametrize("predictions", FORMATS)
def test_what_is_loaded_is_what_was_written(tmp_path: Path, predictions: Any) -> None:
    evaluation = _evaluation()
    folder = tmp_path / "deep" / "eta=40"
    write_results(folder, evaluation, TABLE, predictions=predictions)
    loaded = load_results(folder)
    expected = pd.DataFrame(evaluation.to_records())
    pd.testing.assert_frame_equal(loaded.scores, expected, check_exact=True)
    rows = [
        (model, task, p.id, p.response, p.value, p.gold, p.credit, p.shortened)
        for model, scores in evaluation.scores.items()
        for task, s in scores.items()
        for p in s.predictions
    ]
    assert len(loaded.predictions) == len(rows)
    for row, found in zip(rows, loaded.predictions.itertuples(), strict=True):
        texts = (found.model, found.task, found.id, found.response, found.gold)
        assert texts == (row[0], row[1], row[2], row[3], row[5])
        value = None if pd.isna(found.value) else found.value
        number = None if math.isnan(found.number) else found.number
        assert value == (None if row[4] is None else str(row[4]))
        assert number == (row[4] if isinstance(row[4], float) else None)
        assert (None if math.isnan(found.credit) else found.credit) == row[6]
        assert found.shortened == row[7]


def test_both_formats_load_as_the_same_frame_with_clean_types(tmp_path: Path) -> None:
    frames = []
    for name in FORMATS:
        write_results(tmp_path / name, _evaluation(), TABLE, predictions=name)
        frames.append(load_results(tmp_path / name).predictions)
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    types = {name: frames[0][name].dtype.kind for name in ("number", "credit", "shortened")}
    assert types == {"number": "f", "credit": "f", "shortened": "b"}


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.floats()),
        min_size=1,
        unique_by=lambda row: row[0],  # the text is the id too
    )
)
def test_any_response_and_number_survives_both_formats(
    tmp_path_factory: pytest.TempPathFactory, responses: list[tuple[str, float]]
) -> None:
    folder = tmp_path_factory.mktemp("results")
    rows = tuple(Prediction(text, text, number, text, 1.0) for text, number in responses)
    texts = [text for text, _ in responses]
    numbers = [number if math.isfinite(number) else math.nan for _, number in responses]
    for name in FORMATS:
        write_results(folder / name, _evaluation(rows), TABLE, predictions=name)
        found = load_results(folder / name).predictions.iloc[: len(rows)]
        for column in ("id", "response", "gold"):
            assert found[column].tolist() == texts
        assert found["value"].tolist() == [str(number) for _, number in responses]
        np.testing.assert_array_equal(found["number"], numbers)


def test_each_file_can_be_read_without_us(tmp_path: Path) -> None:
    write_results(tmp_path / "a", _evaluation(), TABLE)
    write_results(tmp_path / "b", _evaluation(), TABLE, predictions="jsonl")
    members = {path.name for path in (tmp_path / "a").iterdir()}
    assert members == {"scores.json", "scores.csv", "table.md", "predictions.parquet"}
    assert (tmp_path / "a" / "table.md").read_text() == TABLE + "\n"
    parquet = pd.read_parquet(tmp_path / "a" / "predictions.parquet")
    lines = (tmp_path / "b" / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    assert [row["response"] for row in rows] == parquet["response"].tolist()
    assert list(rows[0]) == parquet.columns.tolist()
    csv = pd.read_csv(tmp_path / "a" / "scores.csv")
    pd.testing.assert_frame_equal(
        csv.drop(columns=["model", "task"]),
        pd.DataFrame(_evaluation().to_records()).drop(columns=["model", "task"]),
        rtol=1e-15,  # pandas before 3.1 reads decimals to within their last digit
    )


def test_what_is_undefined_is_null_in_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    write_results(tmp_path / "out", _evaluation(), TABLE, predictions="jsonl")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text(), parse_constant=refuse)
    assert [record["score"] for record in scores["scores"]] == [0.5, None] * 3
    assert [found["value"] for found in scores["differences_by_task"]] == [0, None]
    for line in (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").split("\n"):
        assert not line or json.loads(line, parse_constant=refuse)


def test_results_are_replaced_only_when_asked_and_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_results(folder, _evaluation(), TABLE)
    (folder / "chart.png").write_bytes(b"png")
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_results(folder, _evaluation(PREDICTIONS[:1]), TABLE)
    assert len(load_results(folder).predictions) == 21
    write_results(folder, _evaluation(PREDICTIONS[:1]), TABLE, predictions="jsonl", overwrite=True)
    assert len(load_results(folder).predictions) == 12
    members = {path.name for path in folder.iterdir()}
    assert members == {"scores.json", "scores.csv", "table.md", "predictions.jsonl"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["notes.txt"], "holds no scores.json, so it is no results folder"),
        (["merge_report.json", "model.safetensors"], "holds no scores.json"),
        (["scores.json", "thesis.tex"], "holds thesis.tex, which is no part of the results folder"),
    ],
)
def test_what_is_no_results_folder_is_never_replaced(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for name in names:
        (tmp_path / name).write_text("kept")
    with pytest.raises(UsageError, match=message):
        check_results(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match=message):
        write_results(tmp_path, _evaluation(), TABLE, overwrite=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        names, "kept"
    )


def test_an_empty_or_absent_folder_may_be_taken(tmp_path: Path) -> None:
    check_results(tmp_path, overwrite=False)
    check_results(tmp_path / "absent", overwrite=False)
    write_results(tmp_path / "absent", _evaluation(), TABLE)
    (tmp_path / "empty").mkdir()
    write_results(tmp_path / "empty", _evaluation(), TABLE)
    assert len(load_results(tmp_path / "empty").predictions) == 21


def test_a_failure_leaves_the_old_results(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_results(folder, _evaluation(), TABLE)
    with pytest.raises(UnicodeEncodeError):
        write_results(folder, _evaluation(), "half a character: \ud800", overwrite=True)
    assert len(load_results(folder).predictions) == 21
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_loading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="A NoneType stands where a results folder is wanted"):
        load_results(None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is not a results folder"):
        load_results(tmp_path)
    folder = tmp_path / "out"
    write_results(folder, _evaluation(), TABLE)
    whole = (folder / "predictions.parquet").read_bytes()
    (folder / "predictions.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StarmergeError, match=r"predictions\.parquet cannot be read"):
        load_results(folder)
    (folder / "predictions.parquet").unlink()
    with pytest.raises(StarmergeError, match="neither"):
        load_results(folder)
    (folder / "predictions.jsonl").write_text('{"model": "base"\n')
    with pytest.raises(StarmergeError, match=r"predictions\.jsonl cannot be read"):
        load_results(folder)
    (folder / "scores.json").write_text('{"scores": [')
    with pytest.raises(StarmergeError, match=r"scores\.json is not JSON"):
        load_results(folder)
    (folder / "scores.json").write_text('{"scores": []}')
    with pytest.raises(StarmergeError, match="has no schema version: an older starmerge wrote it"):
        load_results(folder)
    (folder / "scores.json").write_text('{"schema_version": 7, "scores": []}')
    with pytest.raises(StarmergeError, match=r"has the schema version 7: .* reads version 1"):
        load_results(folder)
    (folder / "scores.json").write_text('{"schema_version": 1, "scores": 1}')
    with pytest.raises(StarmergeError, match=r"scores\.json holds no list of scores"):
        load_results(folder)
