"""Where rows come from: datasets, files of each kind, generators; and samples of them."""

import csv
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.tasks.sources import (
    FileSource,
    GeneratorSource,
    HubSource,
    Sample,
    read_file,
    read_rows,
)

ROWS = [
    {"text": "first, with a comma", "label": 1},
    {"text": 'second with "quotes"\nand a line break', "label": 0},
    {"text": "drittes: äöü 中", "label": 1},
]


def _written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    elif kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = list(read_file(_written(tmp_path, kind, ROWS)))
    assert [(row["text"], int(row["label"])) for row in rows] == [
        (row["text"], row["label"]) for row in ROWS
    ]


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rows.jsonl does not exist"):
        read_file(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match=r"rows.txt is neither .jsonl nor .csv nor .parquet"):
        read_file(tmp_path / "rows.txt")
    (tmp_path / "rows.csv").write_text("text,label\na,1\nb\n")
    with pytest.raises(UsageError, match=r"rows.csv, line 3: other columns than"):
        read_file(tmp_path / "rows.csv")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UsageError, match=r"rows.parquet is not a Parquet file"):
        read_file(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("text,label\n")
    with pytest.raises(UsageError, match="has no rows"):
        read_file(tmp_path / "rows.csv")


def test_rows_that_no_program_can_read_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"text": "naïve"}'.encode("latin-1"))
    with pytest.raises(UsageError, match="is not UTF-8: .* Save it as UTF-8"):
        read_file(file)
    file.write_text('{"text": ' + "[" * 100_000)
    with pytest.raises(UsageError, match="line 1: not JSON"):
        read_file(file)
    (tmp_path / "rows.csv").write_text("text,text\na,b\n")
    with pytest.raises(UsageError, match="two columns have one name"):
        read_file(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text("text,label\n" + "x" * 200_000 + ",1\n")
    (row,) = read_file(tmp_path / "rows.csv")
    assert len(row["text"]) == 200_000


def _dataset(folder: Path, count: int = 50) -> str:
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"text": f"{split} {n}", "label": n % 3} for n in range(count)]
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return str(folder)


def test_datasets_are_read_by_split(tmp_path: Path) -> None:
    source = HubSource(hub=_dataset(tmp_path / "data"), split="test", train_split="train")
    test, train = read_rows(source, "test", "t"), read_rows(source, "train", "t")
    assert test[7] == ("test/7", {"text": "test 7", "label": 1})
    assert train[7] == ("train/7", {"text": "train 7", "label": 1})
    with pytest.raises(UsageError, match="names no rows to train on"):
        read_rows(HubSource(hub=source.hub), "train", "t")
    with pytest.raises(UsageError, match=r"cannot be loaded: .*validation.* Or pass rows"):
        read_rows(HubSource(hub=source.hub, split="validation"), "test", "t")


def test_a_share_of_a_split_is_the_one_that_datasets_takes_by_seed_42(tmp_path: Path) -> None:
    hub = _dataset(tmp_path / "data")
    source = HubSource(hub=hub, split="train", test_share=0.1)
    whole = datasets.load_dataset(hub, split="train")
    parts = whole.train_test_split(test_size=0.1, seed=42)
    for split in ("test", "train"):
        found = [row["text"] for _, row in read_rows(source, split, "t")]
        assert found == parts[split]["text"]


def test_a_dataset_that_cannot_be_had_says_what_to_pass_instead() -> None:
    source = HubSource(hub="nobody/nothing", config="part", note="See the mirror.")
    with pytest.raises(UsageError) as caught:
        read_rows(source, "test", "quiz")
    message = str(caught.value)
    assert "Task quiz: the dataset nobody/nothing part test cannot be loaded" in message
    assert "See the mirror. Or pass rows with the same columns" in message
    assert "--data quiz=rows.jsonl" in message


def numbers(rng: random.Random) -> Iterator[dict[str, object]]:
    for n in range(100):
        yield {"input": str(n % 90), "label": rng.choice("ab")}


def test_generators_are_seeded_and_each_row_is_taken_once() -> None:
    source = GeneratorSource(generator=numbers)
    test, train = read_rows(source, "test", "t"), read_rows(source, "train", "t")
    assert len(test) + len(train) == 90
    assert test == read_rows(source, "test", "t")
    assert {row["input"] for _, row in test}.isdisjoint(row["input"] for _, row in train)
    # Another release with more rows moves none of them.
    more = GeneratorSource(generator=lambda rng: [*numbers(rng), {"input": "x", "label": "a"}])
    assert {r["input"] for _, r in read_rows(more, "test", "t")} - {"x"} == {
        row["input"] for _, row in test
    }


def broken(rng: random.Random) -> Iterator[dict[str, object]]:
    yield {"input": "x"}
    raise ZeroDivisionError("no numbers left")


def test_a_generator_that_fails_is_named() -> None:
    with pytest.raises(UsageError, match=r"Task t: .*broken failed: ZeroDivisionError: no numbers"):
        read_rows(GeneratorSource(generator=broken), "test", "t")


@pytest.mark.parametrize("name", ["nomodule:f", "json:nothing", "json", ":f"])
def test_a_generator_that_cannot_be_imported_is_named(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be imported"):
        read_rows(GeneratorSource(generator=name), "test", "t")


def test_rows_need_the_field_they_are_told_apart_by(tmp_path: Path) -> None:
    file = _written(tmp_path, "jsonl", ROWS)
    with pytest.raises(UsageError, match=r"rows.jsonl/1 has no field 'input'"):
        read_rows(FileSource(file=file, held_out=0.5), "test", "t")
    found = [
        row["text"]
        for split in ("train", "test")
        for _, row in read_rows(FileSource(file=file, held_out=0.5, key="text"), split, "t")
    ]
    assert sorted(found) == sorted(row["text"] for row in ROWS)


@given(
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=60),
    n=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_a_balanced_sample_has_as_many_of_each_label(labels: list[str], n: int, seed: int) -> None:
    rows = list(enumerate(labels))
    taken = Sample(kind="balanced", n=n, seed=seed).take(rows, lambda row: row[1])
    counts = Counter(label for _, label in taken)
    assert set(counts.values()) == {min(n, *Counter(labels).values())}
    assert set(counts) == set(labels)
    assert len(set(taken)) == len(taken)
    assert taken == Sample(kind="balanced", n=n, seed=seed).take(rows, lambda row: row[1])
    fewer = Sample(kind="balanced", n=n, seed=seed).take(rows, lambda row: row[1], limit=7)
    share = max(1, min(n, 7 // len(set(labels)), *Counter(labels).values()))
    assert set(Counter(label for _, label in fewer).values()) == {share}
    everything = Sample(seed=seed).take(rows, lambda row: row[1])
    assert sorted(everything) == rows
    assert Sample(kind="random", n=n, seed=seed).take(rows, lambda row: row[1]) == everything[:n]
