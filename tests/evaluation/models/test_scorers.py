"""Scorers on the real model, or on its first layers: against the plain, unbatched way."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.models.loading import AdapterSwitch, load_model
from starmerge_models.evaluation.models.scorers import (
    Answer,
    LocalModel,
    check_scorer,
    predictions,
    prompter_of,
    run_scorer,
    score_answers,
)
from starmerge_models.evaluation.scoring.matching import read
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.evaluation.tasks.sources import FileSource
from starmerge_models.evaluation.tasks.task import Example, Task
from starmerge_models_demo import ADAPTERS
from tests.conftest import edit_json


@pytest.fixture(scope="module")
def language(smollm2: Path) -> Iterator[LocalModel]:
    """Yield the base in float32, so that only batching can differ, with one adapter on it."""
    with _adapted(smollm2, ADAPTERS / "language") as model:
        yield model


@pytest.fixture(scope="module")
def first_layers(shallow: Path, shallow_adapters: dict[str, Path]) -> Iterator[LocalModel]:
    """Yield the first layers of the same."""
    with _adapted(shallow, shallow_adapters["language"]) as model:
        yield model


@contextmanager
def _adapted(base: Path, adapter: Path) -> Iterator[LocalModel]:
    model, tokenizer = load_model(base, dtype="float32")
    switch = AdapterSwitch(model, {"language": adapter})
    with switch.active("language") as active:
        yield LocalModel(active, tokenizer)


def _ignore(_: int) -> None:
    pass


@pytest.mark.parametrize(("scorer", "name"), [("generate", "language"), ("rank", "past")])
def test_answers_do_not_depend_on_batch_and_order(
    first_layers: LocalModel, scorer: str, name: str
) -> None:
    task = find_task(name)
    rows = task.examples("test", 4)
    together = run_scorer(first_layers, task, rows, scorer, advance=_ignore)
    alone = [run_scorer(first_layers, task, [row], scorer, advance=_ignore)[0] for row in rows]
    backwards = run_scorer(first_layers, task, rows[::-1], scorer, batch_size=2, advance=_ignore)
    assert together == alone == backwards[::-1]
    assert len({answer.response for answer in together}) > 2


def test_a_fine_tune_ranks_the_right_answers_first(language: LocalModel) -> None:
    task = find_task("language")
    rows = task.examples("test", 2)
    answers = run_scorer(language, task, rows, "rank", advance=_ignore)
    assert score_answers(task, rows, answers, "rank").value == 1
    assert len({row.label for row in rows}) > 1


def test_generation_is_that_of_the_library_up_to_where_it_stops(language: LocalModel) -> None:
    task = find_task("language")
    rows = task.examples("test", 2)
    prompter = prompter_of(language)
    answers = run_scorer(language, task, rows, advance=_ignore)
    whole = run_scorer(language, task, rows, mode="reference", advance=_ignore)
    assert score_answers(task, rows, answers).value == 1
    for row, answer, full in zip(rows, answers, whole, strict=True):
        ids = torch.tensor([prompter.prompt(task, row).ids])
        with torch.inference_mode():
            output = language.model.generate(
                input_ids=ids, max_new_tokens=task.max_new_tokens, do_sample=False
            )
        text = language.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert full.response == text
        assert text.startswith(answer.response)
        assert read(task, text, row.label) == read(task, answer.response, row.label)


def test_ranking_takes_the_choice_with_the_highest_likelihood(first_layers: LocalModel) -> None:
    task = find_task("past")
    rows = task.examples("test", 3)
    prompter = prompter_of(first_layers)
    answers = run_scorer(first_layers, task, rows, "rank", advance=_ignore)
    assert (
        len({row.choices.index(answer.response) for row, answer in zip(rows, answers, strict=True)})
        > 1
    )
    for row, answer in zip(rows, answers, strict=True):
        prompt = list(prompter.prompt(task, row).ids)
        likelihoods = {}
        for choice in row.choices:
            option = prompter.answer(choice)
            with torch.inference_mode():
                logits = first_layers.model(input_ids=torch.tensor([prompt + option])).logits[0]
            steps = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
            likelihoods[choice] = float(steps[range(len(option)), option].sum())
        assert answer.response == max(likelihoods, key=likelihoods.__getitem__)


def test_greedy_is_greedy_whatever_the_model_asks_for(shallow: Path, tmp_path: Path) -> None:
    other = shutil.copytree(shallow, tmp_path / "other")
    edit_json(other / "generation_config.json", repetition_penalty=1.8, num_beams=3)
    task = find_task("past")
    rows = task.examples("test", 6)
    answers = [
        run_scorer(LocalModel(*load_model(folder)), task, rows, advance=_ignore)
        for folder in (shallow, other)
    ]
    assert answers[0] == answers[1]


def test_prompts_that_lose_a_part_are_marked(first_layers: LocalModel) -> None:
    task = Task(
        name="t", source=FileSource(file=Path("r.jsonl")), prompt="{text}", labels=["a", "b"]
    )
    rows = [
        Example("1", {"text": "short"}, "a", ("a", "b")),
        Example("2", {"text": "long " * 9000}, "a", ("a", "b")),
    ]
    short = LocalModel(first_layers.model, first_layers.tokenizer)
    first_layers.tokenizer.model_max_length = 64
    try:
        answers = run_scorer(short, task, rows, advance=_ignore)
    finally:
        first_layers.tokenizer.model_max_length = 8192
    assert [answer.shortened for answer in answers] == [False, True]
    assert score_answers(task, rows, answers).shortened == 1


def test_a_prompt_leaves_room_for_the_longest_answer_to_rank(first_layers: LocalModel) -> None:
    task = Task(
        name="t", source=FileSource(file=Path("r.jsonl")), prompt="{text}", choices="options"
    )
    row = Example("1", {"text": "long " * 90}, "a", ("a", "many words " * 10))
    first_layers.tokenizer.model_max_length = 130
    try:
        (short,) = run_scorer(
            first_layers, task, [Example("2", row.fields, "a", ("a", "b"))], "rank", advance=_ignore
        )
        (long,) = run_scorer(first_layers, task, [row], "rank", advance=_ignore)
    finally:
        first_layers.tokenizer.model_max_length = 8192
    assert (short.shortened, long.shortened) == (False, True)


def test_answers_are_read_by_the_mode_and_choices_are_not_read() -> None:
    task = find_task("sentiment")
    row = Example("1", {"input": "x"}, "negative", ("positive", "negative"))
    answer = [Answer("not positive but negative")]
    (strict,) = predictions(task, [row], answer)
    (reference,) = predictions(task, [row], answer, mode="reference")
    assert (strict.value, reference.value) == (None, "positive")
    (ranked,) = predictions(task, [row], [Answer("negative")], "rank")
    assert (ranked.value, ranked.credit) == ("negative", 1)


def test_what_has_nothing_to_rank_is_refused() -> None:
    task = Task(name="t", source=FileSource(file=Path("r.jsonl")), prompt="{text}", match="number")
    row = Example("r/1", {"text": "x"}, "1.5")
    check_scorer("generate", task, [row])
    with pytest.raises(UsageError, match="row r/1: there are no answers to rank"):
        check_scorer("rank", task, [row])
