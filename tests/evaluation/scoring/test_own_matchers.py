"""Matchers of users: what a decorated function reads, and what is wrong with one that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.scoring.matching import MATCHERS, Reading, is_final, matcher, read
from starmerge_models.evaluation.tasks.files import load_task
from starmerge_models.evaluation.tasks.task import Task

HEAD = "from starmerge_models.evaluation.scoring.matching import matcher\n"


def _task(file: Path, body: str, options: str = "", **settings: Any) -> Task:
    """Return a task whose matcher is a function of a file."""
    file.write_text(f"{HEAD}@matcher('mine'{options})\ndef mine(response, gold, labels):\n{body}\n")
    return Task(
        name="t", source={"file": "rows.jsonl"}, prompt="{x}", match=f"{file}:mine", **settings
    )


def test_the_row_is_right_if_the_right_answer_is_read(tmp_path: Path) -> None:
    task = _task(tmp_path / "a.py", "    return response.split(':')[1] or None")
    assert read(task, "answer:Paris", "Paris") == Reading("Paris", 1.0)
    assert read(task, "answer:Rome", "Paris") == Reading("Rome", 0.0)
    assert read(task, "answer:", "Paris") == Reading(None, 0.0)
    assert read(task, "answer:Paris", "Paris", "reference") == Reading("Paris", 1.0)
    assert not is_final(task, "answer:Paris. That is it.")


def test_a_pair_says_what_the_row_earns(tmp_path: Path) -> None:
    task = _task(tmp_path / "a.py", "    return response, int(response in gold)")
    assert read(task, "Par", "Paris") == Reading("Par", 1.0)
    graded = _task(tmp_path / "b.py", "    return response, 0.25", ", graded=True", metric="f1")
    assert read(graded, "Par", "Paris") == Reading("Par", 0.25)


def test_numbers_are_floats_and_serve_a_correlation(tmp_path: Path) -> None:
    body = "    return len(response)"
    task = _task(tmp_path / "a.py", body, ", numbers=True", metric="spearman", range=(0, 5))
    assert read(task, "xxx", "3.0") == Reading(3.0, None)
    assert read(_task(tmp_path / "a.py", body, ", numbers=True"), "xxx", "3.0").credit == 1


def test_labels_are_given_and_are_all_that_may_be_read(tmp_path: Path) -> None:
    labels = {"0": ["no", "nope"], "1": "yes"}
    task = _task(tmp_path / "a.py", "    return labels[len(response)]", labels=labels)
    assert read(task, "x", "no") == Reading("yes", 0.0)
    other = _task(tmp_path / "b.py", "    return 'nope'", labels=labels)
    with pytest.raises(StarmergeError, match=r"'mine' reads 'nope' .* one of the labels \(no, yes"):
        read(other, "x", "no")


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        ("    return 1 / 0", "", "'mine' failed at the response 'so': ZeroDivisionError"),
        ("    return 3", "", "'mine' reads 3 in the response 'so'. It must return a text, or None"),
        ("    return 'x'", ", numbers=True", "reads 'x' in the response 'so'. .* a finite number"),
        ("    return float('nan')", ", numbers=True", "reads nan .* a finite number, or None"),
        ("    return 'x', 0.5", "", r"gives a row 0.5. It must give 0 or 1 \(else: graded=True\)"),
        ("    return 'x', 2", "", "gives a row 2"),
    ],
)
def test_what_a_function_returns_wrongly_is_named(
    tmp_path: Path, body: str, options: str, message: str
) -> None:
    with pytest.raises(StarmergeError, match=message):
        read(_task(tmp_path / "a.py", body, options), "so", "1")


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (", numbers=True", {"labels": ["a", "b"]}, "'mine' reads numbers: it is for tasks without"),
        (", graded=True", {}, "match 'mine' needs metric 'f1'"),
        ("", {"metric": "pearson"}, "metric 'pearson' is of numbers"),
        ("", {"range": (0, 1)}, "range is for match 'number'"),
    ],
)
def test_a_matcher_that_does_not_fit_the_task_is_refused(
    tmp_path: Path, options: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _task(tmp_path / "a.py", "    return response", options, **settings)


def test_a_task_file_names_a_file_beside_it_and_its_content_is_part_of_the_task(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"x": "q", "label": "a"}\n')
    _task(tmp_path / "mine.py", "    return response")
    file = tmp_path / "task.yaml"
    file.write_text("source: {file: rows.jsonl}\nprompt: '{x}'\nmatch: mine.py:mine\n")
    task = load_task(file)
    assert task.read_by.name == task.answers == "mine"
    assert "mine" not in MATCHERS
    before = task.fingerprint(task.examples("test"))
    _task(tmp_path / "mine.py", "    return response.strip()")
    assert load_task(file).fingerprint(task.examples("test")) != before


def test_a_file_without_a_matcher_and_a_taken_name_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def plain(response, gold, labels):\n    return response\n")
    with pytest.raises(UsageError, match=r"plain is no matcher: it is not decorated. Write @match"):
        MATCHERS.find(f"{tmp_path}/a.py:plain")
    with pytest.raises(UsageError, match="calls itself 'number', and so does the matcher"):
        matcher("number")(lambda response, gold, labels: None)
