"""Bare rows: columns by other names, and each fault named with file, row and what to do."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.tasks import all_rows_of, find_task, task_of_rows
from starmerge_models.evaluation.tasks.sources import FileSource, split_sizes
from starmerge_models.evaluation.tasks.task import Task

KINDS = ["jsonl", "csv", "parquet"]
NAN = float("nan")


def _written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"mine.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


def _rows(**changes: Any) -> list[dict[str, Any]]:
    """Return 20 rows of two labels, of which the third has some changes."""
    rows: list[dict[str, Any]] = [{"input": f"row {n}", "label": "ab"[n % 2]} for n in range(20)]
    rows[2] |= changes
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_other_names_make_the_same_task(tmp_path: Path, kind: str) -> None:
    rows = _rows()
    other = [{"id": n, "text": row["input"], "kind": row["label"]} for n, row in enumerate(rows)]
    plain = task_of_rows(_written(tmp_path, kind, rows))
    (tmp_path / "other").mkdir()
    file = _written(tmp_path / "other", kind, other)
    mapped = find_task(str(file), columns={"input": "text", "label": "kind"})
    assert isinstance(mapped, Task)
    for split in ("test", "train"):
        found, expected = mapped.examples(split), plain.examples(split)
        assert [(row.id, row.label) for row in found] == [(row.id, row.label) for row in expected]
        assert [mapped.render(row.fields) for row in found] == [
            plain.render(row.fields) for row in expected
        ]


def test_a_task_file_may_name_columns_too(tmp_path: Path) -> None:
    _written(tmp_path, "csv", [{"My text": "x", "label": "a"}])
    (tmp_path / "t.yaml").write_text(
        "source: {file: mine.csv, columns: {text: My text}}\nprompt: '{text}'\n"
    )
    task = find_task(str(tmp_path / "t.yaml"))
    assert isinstance(task, Task)
    (row,) = task.examples("test")
    assert task.render(row.fields) == "x"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            None,
            r"mine.csv, row 1: a row has 'input' and 'label', and this one has 'text', 'kind'\. "
            r"If other columns hold them, name these: --columns input=text,label=kind$",
        ),
        ({"input": "text"}, r"name these: --columns label=kind$"),
        ({"input": "txt"}, r"row 1: there is no column 'txt'. It has: text, kind. Did you mean"),
        ({"inputs": "text"}, r"--columns inputs=…: rows have input, label and choices"),
    ],
)
def test_missing_columns_are_named_with_those_that_there_are(
    tmp_path: Path, columns: dict[str, str] | None, message: str
) -> None:
    file = _written(tmp_path, "csv", [{"text": "x", "kind": "a"}])
    with pytest.raises(UsageError, match=message):
        task_of_rows(file, columns)


@pytest.mark.parametrize("kind", KINDS)
def test_one_label_alone_is_an_error(tmp_path: Path, kind: str) -> None:
    rows = [{"input": f"row {n}", "label": "a"} for n in range(10)]
    file = _written(tmp_path, kind, rows)
    with pytest.raises(UsageError, match=rf"mine.{kind}: all 10 rows have the label 'a'.*Add rows"):
        task_of_rows(file)


@pytest.mark.parametrize("column", ["input", "label"])
@pytest.mark.parametrize(
    ("kind", "value", "what"),
    [
        ("jsonl", None, "null"),
        ("jsonl", NAN, "NaN"),
        ("jsonl", "", "no text"),
        ("jsonl", " \n", "no text"),
        ("csv", None, "no text"),
        ("csv", "", "no text"),
        ("parquet", None, "null"),
        ("parquet", "", "no text"),
    ],
)
def test_an_empty_field_is_named_with_its_row(
    tmp_path: Path, column: str, kind: str, value: object, what: str
) -> None:
    file = _written(tmp_path, kind, _rows(**{column: value}))
    message = rf"mine.{kind}, row 3: '{column}' is empty \({what}\). Fill it in, or leave the row"
    with pytest.raises(UsageError, match=message):
        task_of_rows(file)


def test_labels_that_are_nan_in_parquet_are_named_and_numbers_are_labels(tmp_path: Path) -> None:
    file = tmp_path / "mine.parquet"
    inputs = [f"row {n}" for n in range(20)]
    table = pa.table({"input": inputs, "label": [float(n % 2) for n in range(20)]})
    parquet.write_table(table, file)
    task = task_of_rows(file)
    assert task.words == (("0",), ("1",))
    assert {row.label for row in task.examples("train")} == {"0", "1"}
    parquet.write_table(pa.table({"input": inputs, "label": [NAN, *[1.0] * 19]}), file)
    with pytest.raises(UsageError, match=r"mine.parquet, row 1: 'label' is empty \(NaN\)"):
        task_of_rows(file)


@pytest.mark.parametrize("column", ["input", "label"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("jsonl", r"mine.jsonl, line 3: not JSON \(.* holds half a character\). Mend the line"),
        ("csv", r"mine.csv, line 4 is not UTF-8: .* Save it as UTF-8"),
        ("parquet", r"mine.parquet, row 3 is not UTF-8: .* Save it as UTF-8"),
    ],
)
def test_half_a_character_is_named_with_its_row(
    tmp_path: Path, kind: str, column: str, message: str
) -> None:
    rows = _rows(**{column: "x\ud800"})
    if kind == "jsonl":
        file = _written(tmp_path, kind, rows)
    else:
        raw = [{k: v.encode("utf-8", "surrogatepass") for k, v in row.items()} for row in rows]
        file = tmp_path / f"mine.{kind}"
        if kind == "csv":
            lines = [b"input,label", *(b"%b,%b" % (row["input"], row["label"]) for row in raw)]
            file.write_bytes(b"\n".join(lines) + b"\n")
        else:
            columns = {}
            for name in ("input", "label"):
                binary = pa.array([row[name] for row in raw], pa.binary())
                columns[name] = pa.Array.from_buffers(pa.string(), 20, binary.buffers())
            parquet.write_table(pa.table(columns), file)
    with pytest.raises(UsageError, match=message):
        task_of_rows(file)


def test_labels_that_only_case_tells_apart_are_an_error_of_the_file(tmp_path: Path) -> None:
    file = _written(tmp_path, "jsonl", _rows(label="B"))
    with pytest.raises(UsageError, match=r"mine.jsonl: labels: 'b' stands for both 'B' and 'b'"):
        task_of_rows(file)


def test_rows_of_a_generator_with_half_a_character_are_named(tmp_path: Path) -> None:
    def rows(_: object) -> list[dict[str, str]]:
        return [{"input": "x\ud800", "label": "a"}]

    task = Task(name="t", source={"generator": rows}, prompt="{input}")
    with pytest.raises(UsageError, match=r"Row 0: 'input' holds half a character"):
        task.examples("test")


def test_all_rows_are_scored_on_demand(tmp_path: Path) -> None:
    task = task_of_rows(_written(tmp_path, "jsonl", _rows()))
    held_out, training = len(task.examples("test")), len(task.examples("train"))
    assert split_sizes(task.source, "mine") == (held_out, training)
    assert held_out + training == 20
    (whole,) = all_rows_of([task])
    assert len(whole.examples("test")) == 20
    assert split_sizes(whole.source, "mine") is None
    with pytest.raises(UsageError, match="names no rows to train on"):
        whole.examples("train")
    # Rows that have another split stay as they are.
    other = task.model_copy(update={"source": FileSource(file=tmp_path / "mine.jsonl")})
    past = find_task("past")
    assert all_rows_of([other, past, task])[:2] == [other, past]
    with pytest.raises(UsageError, match="--all-rows: none of the tasks has a file of which some"):
        all_rows_of([other, past])
