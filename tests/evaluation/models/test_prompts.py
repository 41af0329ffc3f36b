"""How rows become tokens: templates, dates, and what is cut when the context is short."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.models.prompts import Prompter
from starmerge_models.evaluation.tasks.sources import FileSource
from starmerge_models.evaluation.tasks.task import Example, Task

LLAMA_3_2 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul '
    '2024" %}{%- endif %}{%- endif %}<|start|>system\nToday Date: {{ date_string }}\n'
    "{%- for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{%- endfor %}{%- if add_generation_prompt %}<|start|>assistant\n{%- endif %}"
)
"""Prints the date by the way of templates of that family, in words of our own."""

MINISTRAL = "\n{{ strftime_now('%A, %d %B %Y') }} {{ messages[0]['content'] }}"
"""Asks for the date itself."""


@pytest.fixture
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def _task(**keys: Any) -> Task:
    return Task(
        name="t",
        source=FileSource(file=Path("r.jsonl")),
        **{"prompt": "Which?\n{text}\nAnswer a or b.", "labels": ["a", "b"], **keys},
    )


def _row(text: str, **fields: str) -> Example:
    return Example("r/1", {"text": text, **fields}, "a", ("a", "b"))


def test_a_template_stands_around_the_prompt_once(tokenizer: Any) -> None:
    prompt = Prompter(tokenizer).prompt(_task(), _row("word"))
    text = tokenizer.decode(prompt.ids)
    assert text.count("<|im_start|>user\nWhich?\nword\nAnswer a or b.<|im_end|>") == 1
    assert text.endswith("<|im_start|>assistant\n")
    assert not prompt.shortened


def test_the_chat_policy_is_followed(tokenizer: Any) -> None:
    prompter = Prompter(tokenizer)

    def asked(chat: str) -> str:
        text: str = tokenizer.decode(prompter.prompt(_task(chat=chat), _row("word")).ids)
        return text

    assert asked("none") == "Which?\nword\nAnswer a or b.\n"
    assert asked("template") == asked("auto")
    assert asked("template") == asked("template-without-generation-prompt") + (
        "<|im_start|>assistant\n"
    )
    tokenizer.chat_template = None
    assert asked("auto") == asked("none")
    with pytest.raises(UsageError, match="Task t wants a chat template"):
        asked("template")


def test_there_is_one_beginning_of_text(tokenizer: Any) -> None:
    tokenizer.chat_template = LLAMA_3_2
    tokenizer.add_bos_token = True
    ids = Prompter(tokenizer).prompt(_task(), _row("word")).ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("template", "date"),
    [(LLAMA_3_2, "Today Date: 01 Jan 2025<"), (MINISTRAL, "\nWednesday, 01 January 2025 ")],
)
def test_the_day_of_the_evaluation_is_in_no_prompt(
    tokenizer: Any, template: str, date: str
) -> None:
    tokenizer.chat_template = template
    assert date in tokenizer.decode(Prompter(tokenizer).prompt(_task(), _row("word")).ids)


@pytest.mark.parametrize("limit", [70, 71, 72, 73, 200])
def test_a_long_passage_loses_its_end_and_the_rest_stays(tokenizer: Any, limit: int) -> None:
    task = _task(prompt="Which?\n{text}\nOf: {hint}\nAnswer a or b.", passage="text")
    row = _row("début " + "naïve façade 中文 " * 400, hint="a long hint " * 3)
    prompter = Prompter(tokenizer, context=limit + task.max_new_tokens)
    prompt = prompter.prompt(task, row)
    assert prompt.shortened
    assert limit - 8 <= len(prompt.ids) <= limit
    text = tokenizer.decode(prompt.ids)
    assert "Which?\ndébut " in text
    assert f"\nOf: {row.fields['hint']}\nAnswer a or b." in text
    assert text.endswith("<|im_start|>assistant\n")
    short = prompter.prompt(task, _row("début", hint="h"))
    assert not short.shortened


def test_without_a_name_the_longest_field_is_the_passage(tokenizer: Any) -> None:
    task = _task(prompt="{hint} {text}")
    prompt = Prompter(tokenizer, context=100).prompt(task, _row("word", hint="long " * 500))
    assert "word<|im_end|>" in tokenizer.decode(prompt.ids)


def test_a_prompt_that_is_too_long_without_its_passage_is_refused(tokenizer: Any) -> None:
    task = _task(prompt="Which? " * 300 + "{text}")
    with pytest.raises(UsageError, match=r"the prompt has 631 tokens, .* takes 90"):
        Prompter(tokenizer, context=100).prompt(task, _row("word"))


def test_an_encoder_gets_the_text_and_its_end(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    prompter = Prompter(tokenizer, context=20, is_encoder_decoder=True)
    prompt = prompter.prompt(_task(), _row("word"))
    assert tokenizer.decode(prompt.ids) == "Which?\nword\nAnswer a or b."
    assert len(prompter.prompt(_task(), _row("word " * 100)).ids) <= 20
    assert tokenizer.decode(prompter.answer("a")) == "a" + tokenizer.eos_token


def test_an_answer_ends_with_the_end_of_the_text(tokenizer: Any) -> None:
    assert tokenizer.decode(Prompter(tokenizer).answer("a")) == "a<|im_end|>"
    tokenizer.chat_template = None
    assert tokenizer.decode(Prompter(tokenizer).answer("a")) == " a<|im_end|>"
