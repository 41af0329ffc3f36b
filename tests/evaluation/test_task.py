"""Tasks: how answers are read, and where rows come from."""

import json
from pathlib import Path

import pytest

from starmerge.errors import UsageError
from starmerge.evaluation.task import Example, Task, load_path
from starmerge.evaluation.tasks import TASKS, find_task


def _closed(*labels: str) -> Task:
    return Task("t", "", lambda _: iter(()), labels, "tests")


@pytest.mark.parametrize(
    ("labels", "response", "answer"),
    [
        (("no", "yes"), "I know: yes", "yes"),
        (("no", "yes"), "Not at all", None),
        (("plausible", "not plausible"), "It is not plausible.", "not plausible"),
        (("entail", "does not entail"), "does not entail", "does not entail"),
        (("a", "b"), "A: the answer", "A"),
        (("a", "b"), "banana", None),
        (("positive", "negative"), "negative, not positive", "negative"),
        (("0", "1"), "10", None),
        (("North", "North America"), "North America", "North America"),
        (("plausible", "not plausible"), "Not\nplausible.", "Not\nplausible"),
        (("North America", "Asia"), "north america!", "north america"),
    ],
)
def test_reads_the_first_whole_word_label(
    labels: tuple[str, ...], response: str, answer: str | None
) -> None:
    task = _closed(*labels)
    assert task.read(response) == answer
    for label in labels:
        right = task.is_right(response, Example("", label, labels))
        assert right == (answer is not None and answer.lower().split() == label.lower().split())


def test_open_answers_are_right_when_the_label_stands_in_them() -> None:
    task = Task("t", "", lambda _: iter(()), None, "tests", answer=r"\d+")
    row = Example("twelve", "12", ("12", "13"))
    assert task.is_right("It is 12.", row)
    assert not task.is_right("It is 123.", row)
    assert not task.is_right("It is 12.5 or 3,12.", row)
    assert task.is_right("12,345", Example("", "12345", ()))
    assert not task.is_right("12,345", Example("", "345", ()))
    assert task.read("no number") is None
    assert task.read("maybe 7") == "7"


@pytest.mark.parametrize("name", sorted(TASKS))
def test_registered_tasks_are_fixed_and_without_leaks_or_rare_labels(name: str) -> None:
    task = TASKS[name]
    train, test = task.examples("train"), task.examples("test")
    assert train == task.examples("train")
    assert task.examples("test", 50) == test[:50]
    assert not {row.input for row in train} & {row.input for row in test}
    assert len(train) >= 800
    assert len(test) >= 200
    for row in [*train, *test]:
        assert row.input.strip()
        assert row.label in row.choices
        assert len(set(row.choices)) == len(row.choices) > 1
        # The instruction may name the label; the label itself must read as right.
        assert task.is_right(row.label, row)
    if task.labels is not None:
        counts = [sum(row.label == label for row in train) for label in task.labels]
        assert max(counts) <= 3 * min(counts)


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_jsonl_file_is_a_task_with_its_own_split(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    _write(path, [{"input": f"row {n}", "label": "ab"[n % 2]} for n in range(200)])
    task = find_task(str(path))
    assert (task.name, task.labels) == ("mine", ("a", "b"))
    train, test = task.examples("train"), task.examples("test")
    assert len(train) + len(test) == 200
    assert 20 <= len(test) <= 60


def test_a_folder_is_a_task_with_instruction_and_given_split(tmp_path: Path) -> None:
    folder = tmp_path / "quiz"
    folder.mkdir()
    _write(folder / "train.jsonl", [{"input": "1", "label": "x", "choices": ["x", "y"]}])
    _write(folder / "test.jsonl", [{"input": "2", "label": "z", "choices": ["z", "y"]}])
    (folder / "INSTRUCTION.txt").write_text("Which?\n")
    task = load_path(folder)
    assert (task.name, task.instruction, task.labels) == ("quiz", "Which?", None)
    assert [row.input for row in task.examples("train")] == ["1"]
    assert task.examples("test") == [Example("2", "z", ("z", "y"))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"input": "x"}', "line 1: a row is an object with 'input' and 'label'"),
        ("", "has no rows"),
        ('{"input": "row 0", "label": "a"}', "too few rows: none are for testing"),
        ('{"input": "x", "label": "a", "choices": ["b"]}', "must list its label 'a'"),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(UsageError, match=message):
        find_task(str(tmp_path / "bad.jsonl")).examples("test")


def test_names_the_nearest_task() -> None:
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        find_task("digit")
