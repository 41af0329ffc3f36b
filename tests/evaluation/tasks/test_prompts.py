"""Prompts of an installed package: which tasks get them, and what is refused."""

import sys
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import pytest

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.evaluation.tasks.prompts import with_prompts_of
from starmerge_models.evaluation.tasks.sources import FileSource
from starmerge_models.evaluation.tasks.suites import find_suite
from starmerge_models.evaluation.tasks.task import Task

GLUE = ("mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")

needs_fusion_bench = pytest.mark.skipif(
    find_spec("fusion_bench") is None, reason="pip install --no-deps fusion-bench"
)


@needs_fusion_bench
def test_a_suite_is_asked_in_the_words_its_adapters_were_trained_on() -> None:
    own = [find_task(name) for name in find_suite("flan-t5").tasks]
    found, note = with_prompts_of("fusion-bench", own)
    assert [task.name for task in found] == [task.name for task in own]
    for task, before in zip(found, own, strict=True):
        assert isinstance(task, Task)
        assert isinstance(before, Task)
        if task.name not in GLUE:
            assert task is before
            continue
        assert task.prompt != before.prompt
        # All else is the task's: rows, answers, how they are read, what a long prompt loses.
        assert task.model_copy(update={"prompt": before.prompt}) == before
    assert note.startswith(f"Prompts: {', '.join(GLUE)} in the words of fusion-bench 0.")
    assert note.endswith("; finance, imdb, agnews, hella, boolq, piqa in the task's own.")


@needs_fusion_bench
def test_a_prompt_is_the_one_that_the_package_makes_of_a_row() -> None:
    # Its preprocessors fill the template by str.format with the row's fields.
    package = find_spec("fusion_bench")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "tasks" / "flan_t5_text_generation"
    template = run_path(str(folder / "glue_prompt_templates.py"))["rte"]["input_text"]
    row = {"sentence1": "It {rained}.", "sentence2": "It was wet.", "label": 0}
    (task,), note = with_prompts_of("fusion-bench", [find_task("flan-t5/rte")])
    assert isinstance(task, Task)
    assert task.render(row) == template.format(**row)
    assert "own" not in note
    assert "fusion_bench" not in sys.modules  # which imports far more than its prompts need


@needs_fusion_bench
def test_prompts_that_ask_for_other_answers_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"for cola asks for the answers unacceptable, acceptable, and .* no, yes"
    ):
        with_prompts_of("fusion-bench", [find_task("llama-3.2/cola")])
    open_ended = Task(name="qqp", source=FileSource(file=Path("rows.csv")), prompt="{text}")
    with pytest.raises(UsageError, match="the task reads others"):
        with_prompts_of("fusion-bench", [open_ended])


@needs_fusion_bench
def test_a_task_that_shortens_another_field_is_refused() -> None:
    task = Task(
        name="sst2",
        source=FileSource(file=Path("rows.csv")),
        prompt="{text}",
        passage="text",
        labels={"0": ("negative",), "1": ("positive",)},
    )
    with pytest.raises(UsageError, match=r"does not fit the task sst2: passage 'text' is not in"):
        with_prompts_of("fusion-bench", [task])


@needs_fusion_bench
def test_tasks_without_a_prompt_there_are_refused() -> None:
    with pytest.raises(UsageError, match=r"prompts for cola, .*none of these is selected"):
        with_prompts_of("fusion-bench", [find_task("flan-t5/piqa")])


def test_an_unknown_package_is_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'fusion-bench'"):
        with_prompts_of("fusion_bench", [])


def test_without_the_package_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [])
    sys.path_importer_cache.clear()
    with pytest.raises(UsageError, match="pip install --no-deps fusion-bench"):
        with_prompts_of("fusion-bench", [])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "FileNotFoundError"),
        ("templates = {}", "AttributeError"),
        ("glue_prompt_templates = {'qqp': {'text': ''}}", "KeyError"),
        ("import a_package_that_is_not_there", "ModuleNotFoundError"),
    ],
)
def test_another_version_of_the_package_is_an_error_that_names_one_that_works(
    content: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "fusion_bench" / "tasks" / "flan_t5_text_generation"
    folder.mkdir(parents=True)
    (tmp_path / "fusion_bench" / "__init__.py").touch()
    if content is not None:
        (folder / "glue_prompt_templates.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StarmergeError, match=rf"\({reason}: .*fusion-bench==0\.2\.33"):
        with_prompts_of("fusion-bench", [])
