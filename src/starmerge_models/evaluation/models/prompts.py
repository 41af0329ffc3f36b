"""How a row becomes tokens: the chat template, the instruction, the answer.

One place for training and evaluation, so that an adapter is asked as it was taught.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.tasks.task import Example, Task

PINNED_DATE = datetime(2025, 1, 1)
"""Date given to chat templates that print one, so that a score does not depend on the day."""

_MESSAGE = "The-user's-message"
"""Stands for a message, to see what a chat template puts before it."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    ids: tuple[int, ...]
    """Token ids."""
    shortened: bool
    """Whether the passage lost its end, because the model's context is too short for it."""


@dataclass(frozen=True)
class Prompter:
    """Turns rows into prompts and answers for one model.

    A tokenizer with a chat template gets the row as one user message and the generation prompt; one
    without gets the bare text, for a decoder with a line break. Special tokens come from the
    template alone, so no prompt starts with two BOS tokens.

    Args:
        tokenizer: The model's.
        context: Tokens that the model can attend to; None if there is no limit.
        is_encoder_decoder: Whether the prompt goes to an encoder.
    """

    tokenizer: Any
    context: int | None = None
    is_encoder_decoder: bool = False

    def prompt(self, task: Task, example: Example, new: int | None = None) -> Prompt:
        """Return a row's prompt. A passage that is too long loses its end, never the instruction.

        Args:
            task: The task.
            example: The row.
            new: Tokens that must fit in behind it; by default the task's ``max_new_tokens``.

        Raises:
            UsageError: The task asks for a chat template that the tokenizer lacks, or even without
                the passage the prompt is too long.
        """
        ids = self._encode(task, task.ask(example.fields))
        limit = self._limit(task.max_new_tokens if new is None else new)
        if limit is None or len(ids) <= limit:
            return Prompt(tuple(ids), shortened=False)
        whole = self._encode(task, task.ask(example.fields, passage=""))
        if len(whole) >= limit:
            raise UsageError(
                f"Task {task.name}, row {example.id}: the prompt has {len(ids)} tokens, "
                f"{len(whole)} of them beside the passage, and the model takes {limit}. Shorten "
                "the prompt, or name the field that may be shortened (passage)."
            )
        passage = self.tokenizer(task.passage_text(example.fields), add_special_tokens=False)
        kept = passage["input_ids"][: limit - len(whole)]
        while len(ids) > limit:  # where pieces meet, they may take more tokens than apart
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            ids = self._encode(task, task.ask(example.fields, passage=text))
            kept = kept[: len(kept) - max(1, len(ids) - limit)]
        return Prompt(tuple(ids), shortened=True)

    def answer(self, text: str) -> list[int]:
        """Return the token ids of an answer, ended by the end-of-sequence token."""
        lead = "" if self.tokenizer.chat_template or self.is_encoder_decoder else " "
        ids: list[int] = self.tokenizer(lead + text, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def _limit(self, new: int) -> int | None:
        if self.context is None or self.is_encoder_decoder:
            return self.context
        return self.context - new

    def _encode(self, task: Task, content: str) -> list[int]:
        has_template = bool(self.tokenizer.chat_template)
        if task.chat.startswith("template") and not has_template:
            raise UsageError(
                f"Task {task.name} wants a chat template, and the model's tokenizer has none. "
                "Set chat to auto or none, or use the model's chat version."
            )
        if task.chat == "none" or not has_template:
            end = "" if self.is_encoder_decoder else "\n"
            ids: list[int] = self.tokenizer(content + end)["input_ids"]
            return ids
        wants_answer = task.chat != "template-without-generation-prompt"
        rendered = self._rendered(f"Task {task.name}", content, answer=wants_answer)
        chat: list[int] = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return chat

    def beginning(self) -> list[int]:
        """Return the tokens of the chat template that stand before a user's message.

        Returns:
            Token ids; none where the tokenizer has no chat template, or the template no beginning.

        Raises:
            UsageError: The template is broken, or refuses the message.
        """
        if not self.tokenizer.chat_template:
            return []
        head, found, _ = self._rendered("The base", _MESSAGE, answer=False).partition(_MESSAGE)
        if not found:
            return []
        ids: list[int] = self.tokenizer(head, add_special_tokens=False)["input_ids"]
        return ids

    def _rendered(self, where: str, content: str, *, answer: bool) -> str:
        """Return a prompt in the chat template.

        Args:
            where: What asks, for errors.
            content: The user's message.
            answer: Whether the head of an answer follows it.

        Raises:
            UsageError: The template is broken, or refuses the message.
        """
        from jinja2 import TemplateError  # noqa: PLC0415  (comes with transformers)

        try:
            text: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=answer,
                # Templates take the date from the one or the other.
                date_string=f"{PINNED_DATE:%d %b %Y}",
                chat_template=_PINNED_CLOCK + self.tokenizer.get_chat_template(),
            )
        except TemplateError as error:
            raise UsageError(
                f"{where}: the tokenizer's chat template refuses the prompt: {error}. Set the "
                "task's chat to none, or mend the template."
            ) from error
        return text


def _pinned_clock() -> str:
    """Return the beginning of a chat template that replaces its function ``strftime_now``."""
    parts = (
        f"replace('%{code}', '{PINNED_DATE.strftime('%' + code)}')" for code in "aAbBdHIjmMpSyY"
    )
    return (
        f"{{% macro strftime_now(format) %}}{{{{ format | {' | '.join(parts)} }}}}{{% endmacro %}}"
        "{{ '' }}"  # without it, the template's first line break would go
    )


_PINNED_CLOCK = _pinned_clock()
