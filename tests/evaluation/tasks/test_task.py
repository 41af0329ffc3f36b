"""Tasks as data: what a file may say, how rows become examples, and the generated tasks."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.scoring.matching import read
from starmerge_models.evaluation.tasks import (
    TASKS,
    find_task,
    folder_tasks,
    task_of_prompts,
    with_rows_of,
)
from starmerge_models.evaluation.tasks.files import as_yaml, load_task
from starmerge_models.evaluation.tasks.sources import FileSource, Sample
from starmerge_models.evaluation.tasks.task import Gold, Task

GENERATED = [name for name in TASKS if name.startswith(("demo/", "results/"))]


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _write(path: Path, **keys: Any) -> Path:
    path.write_text(yaml.safe_dump(keys))
    return path


def _task(file: Path, **keys: Any) -> Task:
    return Task(name="t", source=FileSource(file=file), **{"prompt": "{text}", **keys})


def test_a_file_says_all_of_a_task(tmp_path: Path) -> None:
    _jsonl(tmp_path / "rows.jsonl", [{"text": "x", "gold": {"value": 2}, "other": ["p", "q"]}])
    path = tmp_path / "quiz.yaml"
    path.write_text(
        "description: A quiz\n"
        "source: {file: rows.jsonl}\n"
        "prompt: 'Which? {text} or {other[1]} {{braces}}'\n"
        "gold: gold.value\n"
        "labels: {1: 'no', 2: ['yes', 'true']}\n"
    )
    task = load_task(path)
    assert (task.name, task.description, task.words) == (
        "quiz",
        "A quiz",
        (("no",), ("yes", "true")),
    )
    (row,) = task.examples("test")
    assert (row.id, row.label, row.choices) == ("rows.jsonl/1", "yes", ("no", "yes"))
    assert task.render(row.fields) == "Which? x or q {braces}"


def test_a_task_is_written_as_it_was_read(tmp_path: Path) -> None:
    for name, task in TASKS.items():
        path = tmp_path / f"{name.replace('/', '-')}.yaml"
        path.write_text(as_yaml(task))
        assert load_task(path) == task


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"promt": "x"}, "the key 'promt' is unknown. Did you mean 'prompt'"),
        ({"source": {"hub": "a/b", "splits": "x"}}, "'splits' is unknown. Did you mean 'split'"),
        ({"sample": {"kind": "random", "m": 3}}, "'sample.m' is unknown"),
        ({"sample": {"kind": "random"}}, "give n with random or balanced"),
        ({"sample": {"kind": "all", "n": 3}}, "give n with random or balanced"),
        ({"source": {"split": "test"}}, "source needs one of the keys hub, file, generator"),
        ({"source": {"hub": "a/b", "file": "x"}}, "source needs one of the keys"),
        ({"prompt": None}, "prompt: Input should be a valid string"),
        ({"passage": "body"}, "passage 'body' is not in the prompt"),
        ({"prompt": "{text!r}"}, "is no field such as {text}"),
        ({"prompt": "{text.__class__()}"}, "is no field such as {text}"),
        ({"labels": {"0": False, "1": "yes"}}, "quote it"),
        ({"labels": {False: "no", True: "yes"}}, "quote it"),
        ({"labels": ["a"]}, "two at least"),
        ({"labels": {"0": "yes", "1": ["no", "Yes"]}}, "'Yes' stands for both '0' and '1'"),
        ({"labels": {"0": "yes", "1": []}}, "'1' has no word"),
        ({"labels": ["a", "b"], "match": "contains"}, "is for tasks without labels"),
        ({"labels": ["a", "b"], "choices": "options"}, "choices are for tasks without labels"),
        ({"match": "whole-word"}, "match 'whole-word' needs labels"),
        ({"match": "fuzzy"}, "match: No matcher is called 'fuzzy'. Known: contains, exact"),
        ({"metric": "spearman"}, "metric 'spearman' is of numbers: it needs match 'number'"),
        ({"metric": "f1"}, "needs labels, or match 'token-f1'"),
        ({"match": "token-f1"}, "match 'token-f1' needs metric 'f1'"),
        ({"range": [0, 5]}, "range is for match 'number'"),
        ({"gold": {"field": "a", "pattern": "b"}}, "needs a group"),
        ({"gold": {"field": "a", "pattern": "(b"}}, "not a regular expression"),
        ({"answer": "(("}, "answer: not a regular expression"),
        ({"kind": ["text"]}, "is unknown"),
        ({"source": []}, "source holds keys"),
        ({"max_new_tokens": 0}, "max_new_tokens: Input should be greater"),
    ],
)
def test_says_which_key_of_a_file_is_wrong(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    keys = {"source": {"file": "rows.jsonl"}, "prompt": "{text}"} | change
    file = _write(tmp_path / "quiz.yaml", **keys)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load_task(file)
    assert str(file) in str(caught.value)


def test_says_which_key_is_missing_and_what_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prompt: Field required"):
        load_task(_write(tmp_path / "a.yaml", source={"file": "x.jsonl"}))
    (tmp_path / "b.yaml").write_text("- a\n- b\n")
    with pytest.raises(UsageError, match="is not a task"):
        load_task(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="not a readable YAML file"):
        load_task(tmp_path / "c.yaml")
    with pytest.raises(ValidationError):
        Task(name="t", source=FileSource(file=Path("x")), prompt="{a}", colour="red")


def test_a_label_that_the_task_does_not_know_is_named_and_never_guessed(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": 0}, {"text": "y", "label": 7}]
    task = _task(_jsonl(tmp_path / "r.jsonl", rows), labels={"0": ("no",), "1": ("yes",)})
    with pytest.raises(UsageError, match=r"r.jsonl/2: the label '7' is not one .* '0', '1'"):
        task.examples("test")


def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "r.jsonl", [{"txt": "x", "label": "a"}])
    with pytest.raises(UsageError, match="there is no field 'text'. It has: txt, label"):
        _task(file).examples("test")
    with pytest.raises(UsageError, match="there is no field 'gold'"):
        _task(file, prompt="{txt}", gold="gold").examples("test")
    with pytest.raises(UsageError, match=re.escape("there is no field 'label[3]'")):
        _task(file, prompt="{txt}", gold="label[3]").examples("test")


@pytest.mark.parametrize(
    ("value", "label"), [(1, "yes"), (1.0, "yes"), ("1", "yes"), (True, "right"), ("TRUE", "right")]
)
def test_values_of_any_type_find_their_label(tmp_path: Path, value: Any, label: str) -> None:
    file = _jsonl(tmp_path / "r.jsonl", [{"text": "x", "label": value}])
    task = _task(file, labels={"0": "no", "1": "yes", "true": "right"})
    assert task.examples("test")[0].label == label


def test_gold_may_be_a_part_of_a_field(tmp_path: Path) -> None:
    rows = [{"text": "x", "out": ["(B) by bus", "z"]}, {"text": "y", "out": ["(a) on foot"]}]
    task = _task(
        _jsonl(tmp_path / "r.jsonl", rows),
        gold=Gold(field="out[0]", pattern=r"^\(([A-Ca-c])\)"),
        labels=["a", "b", "c"],
        sample=Sample(seed=1),
    )
    assert sorted(row.label for row in task.examples("test")) == ["a", "b"]
    broken = task.model_copy(update={"gold": Gold(field="out[0]", pattern="^([0-9])")})
    with pytest.raises(UsageError, match="the pattern of 'gold' finds nothing in '.B. by bus'"):
        broken.examples("test")


def test_numbers_and_own_choices_are_checked(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "r.jsonl", [{"text": "x", "label": 3.25, "options": ["3.25", "4"]}])
    task = _task(file, match="number", metric="pearson", range=(0, 5))
    assert task.examples("test")[0].label == "3.25"
    (row,) = _task(file, choices="options").examples("test")
    assert (row.label, row.choices) == ("3.25", ("3.25", "4"))
    file = _jsonl(tmp_path / "r.jsonl", [{"text": "x", "label": "high", "options": ["low"]}])
    with pytest.raises(UsageError, match="the right answer 'high' is no number"):
        _task(file, match="number").examples("test")
    with pytest.raises(UsageError, match="the right answer 'high' is not in 'options'"):
        _task(file, choices="options").examples("test")


def test_a_letter_of_a_text_is_no_part_of_a_list(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "r.jsonl", [{"text": "x", "output": "Alice"}])
    with pytest.raises(UsageError, match=re.escape("there is no field 'output[0]'")):
        _task(file, gold="output[0]").examples("test")
    with pytest.raises(UsageError, match=re.escape("there is no field 'text[0]'")):
        _task(file, prompt="{text[0]}", gold="output").examples("test")


def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "r.jsonl", [{"text": None, "label": "a"}])
    with pytest.raises(UsageError, match=r"row r.jsonl/1: the field 'text' is empty \(null\)"):
        _task(file).examples("test")
    file.write_text('{"text": "\\ud800", "label": "a"}\n')
    with pytest.raises(UsageError, match="r.jsonl, line 1: .* holds half a character"):
        _task(file).examples("test")
    file.write_text('{"text": "x", "label": NaN}\n')
    with pytest.raises(UsageError, match=r"the right answer 'label' is empty \(NaN\)"):
        _task(file, match="number").examples("test")


def test_a_fingerprint_knows_rows_and_wording_but_no_names(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "r.jsonl", [{"text": "x", "label": "a"}])
    task = _task(file)
    rows = task.examples("test")
    same = task.model_copy(update={"name": "other", "description": "d"})
    assert task.fingerprint(rows) == same.fingerprint(rows)
    other = task.model_copy(update={"prompt": "{text}?"})
    assert task.fingerprint(rows) != other.fingerprint(rows)
    _jsonl(file, [{"text": "y", "label": "a"}])
    assert task.fingerprint(rows) != task.fingerprint(task.examples("test"))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tasks_are_fixed_and_without_leaks_or_rare_labels(name: str) -> None:
    task = TASKS[name]
    train, test = task.examples("train"), task.examples("test")
    # Made anew from the same seed: rows to score are drawn among those to train on.
    assert task.examples("test", 50) == test[:50]
    assert not {row.fields["input"] for row in train} & {row.fields["input"] for row in test}
    assert len(train) >= (800 if name.startswith("demo/") else 300)
    assert len(test) >= (200 if name.startswith("demo/") else 90)
    for row in [*train, *test]:
        assert row.fields["input"].strip()
        assert row.label in row.choices
        assert len(set(row.choices)) == len(row.choices) > 1
    # The prompt may name the label; the label itself must read as right. Of what is trained on,
    # which nobody reads, a part: a new label is a new pattern, and takes as long as making a row.
    for label in {row.label for row in [*train[::100], *test]}:
        assert read(task, label, label).credit == 1
    counts = Counter(row.label for row in train)
    for words in task.words:
        assert counts[words[0]] >= max(counts[w[0]] for w in task.words) / 3


def test_bare_rows_are_a_task_with_its_own_split(tmp_path: Path) -> None:
    rows = [{"input": f"row {n}", "label": "ab"[n % 2]} for n in range(200)]
    task = find_task(str(_jsonl(tmp_path / "mine.jsonl", rows)))
    assert (task.name, task.words) == ("mine", (("a",), ("b",)))
    train, test = task.examples("train"), task.examples("test")
    assert len(train) + len(test) == 200
    assert 20 <= len(test) <= 60


def test_a_folder_is_a_task_with_instruction_and_given_split(tmp_path: Path) -> None:
    folder = tmp_path / "quiz"
    folder.mkdir()
    _jsonl(folder / "train.jsonl", [{"input": "1", "label": "x", "choices": ["x", "y"]}])
    _jsonl(folder / "test.jsonl", [{"input": "2", "label": "z", "choices": ["z", "y"]}])
    (folder / "INSTRUCTION.txt").write_text("Which {one}?\n")
    task = find_task(str(folder))
    assert (task.name, task.labels) == ("quiz", None)
    assert [row.fields["input"] for row in task.examples("train")] == ["1"]
    (row,) = task.examples("test")
    assert (row.label, row.choices) == ("z", ("z", "y"))
    assert task.render(row.fields) == "Which {one}?\n2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: a row is an object"),
        ('{"input": "x"}', "row 1: a row has 'input' and 'label'"),
        ("", "has no rows"),
        ('{"input": "row 0", "label": "a", "choices": ["a"]}', "no rows for testing"),
        ('{"input": "x", "label": "a", "choices": ["b"]}', "'a' is not in 'choices'"),
        ('{"input": "x", "label": "a", "choices": null}', "'choices' is no list of texts"),
        ('{"input": "x", "label": "a", "choices": "ab"}', "'choices' is no list of texts"),
    ],
)
def test_says_what_is_wrong_with_bare_rows(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(UsageError, match=message):
        find_task(str(tmp_path / "bad.jsonl")).examples("test")


def test_names_are_found_and_missing_ones_have_a_neighbour(tmp_path: Path) -> None:
    assert find_task("digits") is find_task("demo/digits")
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        find_task("digit")
    with pytest.raises(UsageError, match=r"several tasks: flan-t5/mrpc, llama-3.2/mrpc"):
        find_task("mrpc")
    own = _write(tmp_path / "digits.yaml", source={"file": "r.jsonl"}, prompt="{text}")
    assert find_task("digits", folder_tasks(tmp_path).values()) == load_task(own)
    assert find_task(str(own)) == load_task(own)
    _write(tmp_path / "b.yml", name="digits", source={"file": "r.jsonl"}, prompt="{text}")
    with pytest.raises(UsageError, match="two files hold a task called 'digits'"):
        folder_tasks(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no task files"):
        folder_tasks(tmp_path / "empty")


def test_rows_of_a_file_stand_in_for_a_dataset_that_cannot_be_had(tmp_path: Path) -> None:
    task = find_task("llama-3.2/rte")
    with pytest.raises(
        UsageError, match="the dataset .* cannot be loaded: .*--data rte=rows.jsonl"
    ):
        task.examples("test")
    rows = [{"sentence1": f"a {n}", "sentence2": "b", "label": n % 2} for n in range(10)]
    assert (
        len(
            with_rows_of({"t": task}, {"t": _jsonl(tmp_path / "r.jsonl", rows)})[0].examples("test")
        )
        == 10
    )


def test_questions_need_no_answer(tmp_path: Path) -> None:
    rows = _jsonl(tmp_path / "rows.jsonl", [{"text": f"x{number}"} for number in range(9)])
    task = _task(rows, labels=("yes", "no"))
    asked = task.unlabelled_examples("test", 4)
    assert len({row.id for row in asked}) == 4
    assert {row.label for row in asked} == {""}
    assert all(task.render(row.fields).startswith("x") for row in asked)
    with pytest.raises(UsageError, match="no field 'label'"):
        task.examples("test")
    with pytest.raises(UsageError, match="names no rows to train on"):
        task.unlabelled_examples("train")
    _jsonl(rows, [{"other": "x"}])
    with pytest.raises(UsageError, match=r"Task t, row rows.jsonl/1: there is no field 'text'"):
        task.unlabelled_examples("test")


def test_prompts_of_a_file_are_asked_as_the_task_of_that_name_asks(tmp_path: Path) -> None:
    rows = _jsonl(tmp_path / "rows.jsonl", [{"input": f"w{number}"} for number in range(50)])
    own, past = task_of_prompts("mine", rows), task_of_prompts("past", rows)
    assert len(own.unlabelled_examples("train")) == len(past.unlabelled_examples("train")) == 50
    assert own.render({"input": "swim"}) == "swim"
    assert past.render({"input": "swim"}) == find_task("past").render({"input": "swim"})
    _jsonl(rows, [{"input": f"w{number}", "label": "x"} for number in range(50)])
    training = {row.id for row in task_of_prompts("mine", rows).unlabelled_examples("train")}
    testing = {row.id for row in task_of_prompts("mine", rows).unlabelled_examples("test")}
    assert len(training) + len(testing) == 50
    assert 0 < len(testing) < 25
    assert not training & testing
