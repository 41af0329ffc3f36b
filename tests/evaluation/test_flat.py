"""The paper's layout: a JSON file of {task: score} for each method, a folder for the tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.flat import check_flat, task_set, write_flat
from starmerge_models.evaluation.scoring.metrics import Prediction, Score, score


def _score(right: int, n: int) -> Score:
    rows = [
        Prediction(str(k), "", "x", "x" if k < right else "y", float(k < right)) for k in range(n)
    ]
    return score(rows, "accuracy")


def _evaluation(merge: str = "star+ties", right: int = 2) -> Evaluation:
    constant = score([Prediction(str(k), "1", 1.0, str(k), None) for k in range(4)], "spearman")
    tuned = {"past": _score(3, 3), "stsb": constant}
    scores = {
        "base": {"past": _score(1, 3), "stsb": constant},
        "past": {"past": tuned["past"]},
        "stsb": {"stsb": tuned["stsb"]},
        merge: {"past": _score(right, 3), "stsb": constant},
    }
    return Evaluation("generate", "strict", scores, tuned)


def test_each_method_has_a_file_with_rounded_scores(tmp_path: Path) -> None:
    folder = write_flat(tmp_path / "R", _evaluation())
    assert folder == tmp_path / "R" / "past_stsb"
    found = {file.name: json.loads(file.read_text()) for file in folder.iterdir()}
    assert found == {
        "pretrained.json": {"past": 0.3333, "stsb": None},
        "lora.json": {"past": 1.0, "stsb": None},
        "star+ties.json": {"past": 0.6667, "stsb": None},
    }


def test_files_are_replaced_on_demand_alone_and_those_of_other_methods_stay(
    tmp_path: Path,
) -> None:
    write_flat(tmp_path, _evaluation())
    with pytest.raises(UsageError, match=r"pretrained.json"):
        check_flat(tmp_path, ["past", "stsb", "ties"], ["past", "stsb"], overwrite=False)
    with pytest.raises(UsageError, match=r"pretrained.json"):
        write_flat(tmp_path, _evaluation("ties"))
    folder = write_flat(tmp_path, _evaluation("ties", right=0), overwrite=True)
    assert {file.name for file in folder.iterdir()} == {
        "pretrained.json",
        "lora.json",
        "star+ties.json",
        "ties.json",
    }
    assert json.loads((folder / "ties.json").read_text())["past"] == 0


@pytest.mark.parametrize("name", ["pretrained", "lora", "a/b", ".."])
def test_a_model_whose_name_cannot_be_its_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"A model is called .* Give it another name, NAME=PATH"):
        check_flat(tmp_path / "R", [name], ["past"], overwrite=False)
    assert not (tmp_path / "R").exists()


def test_a_set_of_tasks_has_one_folder_in_any_order_and_many_have_a_short_one() -> None:
    assert task_set(["b", "a"]) == task_set(["a", "b"]) == "a_b"
    assert task_set(["lm-eval:x/y"]) == "lm-eval:x-y"
    many = [f"a-long-name-of-task-{number}" for number in range(60)]
    assert task_set(many).startswith("60_tasks_")
    assert task_set(many) != task_set([*many[:-1], "another"])
