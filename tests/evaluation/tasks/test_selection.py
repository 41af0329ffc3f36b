"""Rows to choose by: others than those that are scored, wherever a task has others."""

import json
from pathlib import Path

import numpy as np
import pytest

from starmerge_models.evaluation.tasks import find_task
from starmerge_models.evaluation.tasks.images import ArraySource, ImageTask
from starmerge_models.evaluation.tasks.selection import selection_rows
from starmerge_models.evaluation.tasks.sources import FileSource, Sample
from starmerge_models.evaluation.tasks.task import Task


def _task(tmp_path: Path, sample: Sample, rare: int = 50, train: bool = True) -> Task:
    """Return a task of 100 rows to score, so many of them of the rarer label; as many to train."""
    for part in ("test", "train"):
        labels = ["b"] * rare + ["a"] * (100 - rare)
        rows = [{"input": f"{part} {n}", "label": label} for n, label in enumerate(labels)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{part}.jsonl").write_text(text)
    source = FileSource(
        file=tmp_path / "test.jsonl", train_file=tmp_path / "train.jsonl" if train else None
    )
    return Task(name="t", source=source, sample=sample, prompt="{input}", labels=["a", "b"])


@pytest.mark.parametrize(
    ("sample", "rare", "train", "origin"),
    [
        (Sample(kind="random", n=60), 50, True, "held out"),
        (Sample(kind="random", n=90), 50, True, "training"),
        (Sample(kind="random", n=90), 50, False, "scored"),
        (Sample(), 50, True, "training"),
        (Sample(), 50, False, "scored"),
        (Sample(kind="balanced", n=30), 50, True, "held out"),
        # All rows of the rarer label are scored.
        (Sample(kind="balanced", n=30), 20, True, "training"),
        (Sample(kind="balanced", n=30), 20, False, "scored"),
    ],
)
def test_rows_that_nobody_scores_come_first_then_those_to_train_on(
    tmp_path: Path, sample: Sample, rare: int, train: bool, origin: str
) -> None:
    task = _task(tmp_path, sample, rare, train)
    rows, found = selection_rows(task, 16)
    assert found == origin
    assert len(rows) == 16
    ids = {row.id for row in rows}
    scored = {row.id for row in task.examples("test")}
    assert ids <= scored if origin == "scored" else not ids & scored
    if origin == "training":
        assert ids <= {row.id for row in task.examples("train")}
    if sample.kind == "balanced":
        assert [row.label for row in rows].count("a") == 8
    assert selection_rows(task, 16)[0] == rows


def test_fewer_rows_are_the_first_of_more(tmp_path: Path) -> None:
    task = _task(tmp_path, Sample(kind="random", n=50))
    assert selection_rows(task, 40)[0][:9] == selection_rows(task, 9)[0]


def test_the_tasks_of_the_demo_have_rows_that_were_never_trained_on_nor_scored() -> None:
    rows, origin = selection_rows(find_task("sentiment"), 64)
    assert (len(rows), origin) == (64, "held out")
    # 26 of its rows are left, which are fewer than wanted.
    assert selection_rows(find_task("country"), 64)[1] == "training"
    assert selection_rows(find_task("country"), 16)[1] == "held out"


def test_images_are_chosen_by_others_than_those_scored(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "all.npz", images=pixels, labels=np.arange(60) % 2)
    task = ImageTask(
        name="t",
        source=ArraySource(array=tmp_path / "all.npz"),
        sample=Sample(kind="balanced", n=10),
        labels={"0": "even", "1": "odd"},  # type: ignore[dict-item]
    )
    rows, origin = selection_rows(task, 16)
    assert origin == "held out"
    assert not {row.id for row in rows} & {row.id for row in task.examples("test")}
