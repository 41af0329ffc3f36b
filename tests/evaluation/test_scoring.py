"""Scorers on the real model: against the plain, unbatched way of doing the same."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from starmerge.demo.run import ADAPTERS
from starmerge.errors import UsageError
from starmerge.evaluation.models import AdapterSwitch, load_model
from starmerge.evaluation.prompts import MAX_PROMPT_TOKENS, Prompter
from starmerge.evaluation.scoring import _log_likelihoods, generate, rank
from starmerge.evaluation.task import Example, Task
from starmerge.evaluation.tasks import TASKS
from tests.conftest import MakeAdapter


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> Iterator[tuple[Any, Any]]:
    """Yield the base in float32, so that only batching can differ, with one adapter on it."""
    model, tokenizer = load_model(smollm2)
    switch = AdapterSwitch(model.float(), {"language": ADAPTERS / "language"})
    with switch.active("language") as active:
        yield active, tokenizer


def _ignore(_: int) -> None:
    pass


def test_generation_does_not_depend_on_the_batch(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    task = TASKS["language"]
    rows = task.examples("test", 12)
    together = generate(model, tokenizer, task, rows, _ignore)
    alone = [generate(model, tokenizer, task, [row], _ignore)[0] for row in rows]
    assert together == alone
    assert sum(answer.right for answer in together) >= 11


def test_greedy_is_greedy_whatever_the_model_asks_for(smollm2: Path, tmp_path: Path) -> None:
    for file in smollm2.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((smollm2 / "generation_config.json").read_text())
    config |= {"repetition_penalty": 1.8, "num_beams": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    rows = TASKS["past"].examples("test", 8)
    answers = [
        generate(*load_model(folder), TASKS["past"], rows, _ignore)
        for folder in (smollm2, tmp_path)
    ]
    assert answers[0] == answers[1]


def test_likelihoods_are_those_of_the_whole_text(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompter = Prompter(tokenizer)
    rows = [*TASKS["country"].examples("test", 2), *TASKS["past"].examples("test", 2)]
    tasks = [TASKS["country"]] * 2 + [TASKS["past"]] * 2
    prompts = [prompter.prompt(task, row) for task, row in zip(tasks, rows, strict=True)]
    choices = [[prompter.answer(choice) for choice in row.choices] for row in rows]
    with torch.inference_mode():
        batched = _log_likelihoods(model, prompts, choices, tokenizer.pad_token_id)
        for prompt, options, likelihoods in zip(prompts, choices, batched, strict=True):
            for option, likelihood in zip(options, likelihoods, strict=True):
                logits = model(input_ids=torch.tensor([prompt + option])).logits[0].double()
                steps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
                expected = steps[range(len(option)), option].sum()
                assert float(likelihood) == pytest.approx(float(expected), abs=2e-3)


def test_ranking_picks_the_most_likely_choice(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    rows = TASKS["language"].examples("test", 12)
    answers = rank(model, tokenizer, TASKS["language"], rows, _ignore)
    assert sum(answer.right for answer in answers) >= 11
    assert all(answer.text in row.choices for answer, row in zip(answers, rows, strict=True))


def test_adapters_come_and_go_and_leave_the_base_alone(smollm2: Path) -> None:
    model, tokenizer = load_model(smollm2)
    ids = torch.tensor(
        [Prompter(tokenizer).prompt(TASKS["past"], TASKS["past"].examples("test")[0])]
    )
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        switch = AdapterSwitch(model, {name: ADAPTERS / name for name in ("past", "digits")})
        outputs = {}
        for name in ("past", "digits", None, "past"):
            with switch.active(name) as active:
                outputs.setdefault(name, []).append(active(input_ids=ids).logits)
    assert torch.equal(outputs[None][0], plain)
    assert torch.equal(outputs["past"][0], outputs["past"][1])
    assert not torch.equal(outputs["past"][0], outputs["digits"][0])
    assert not torch.equal(outputs["past"][0], plain)


def test_prompts_have_one_beginning_and_keep_the_instruction(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    prompter = Prompter(tokenizer)
    task = Task("t", "Which?", lambda _: iter(()), ("a",), "tests")
    short = tokenizer.decode(prompter.prompt(task, Example("word", "a", ("a",))))
    assert short.count("<|im_start|>user\nWhich?\nword<|im_end|>") == 1
    assert short.endswith("<|im_start|>assistant\n")
    long = prompter.prompt(task, Example("word " * 5000, "a", ("a",)))
    assert MAX_PROMPT_TOKENS - 4 <= len(long) <= MAX_PROMPT_TOKENS
    text = tokenizer.decode(long)
    assert "Which?\nword" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert prompter.answer("a")[-1] == tokenizer.eos_token_id


def test_a_folder_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a causal language model"):
        load_model(tmp_path)
    with pytest.raises(UsageError, match="is an adapter. The base must be a whole model"):
        load_model(ADAPTERS / "past")


def test_an_adapter_of_another_model_is_refused(smollm2: Path, make_adapter: MakeAdapter) -> None:
    model, _ = load_model(smollm2)
    with pytest.raises(UsageError, match=r"PEFT cannot apply .*wrong to the base"):
        AdapterSwitch(model, {"a": make_adapter("wrong")})
