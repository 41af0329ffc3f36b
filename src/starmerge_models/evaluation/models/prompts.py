"""Converts rows to tokens: the chat template, the prompt, the answer.

Training and evaluation share this module, so that an adapter sees the prompts of its training.
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
"""Placeholder message, to find the text that a chat template puts before a message."""


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt."""

    ids: tuple[int, ...]
    """Token ids."""
    shortened: bool
    """Whether the passage was truncated to fit into the model's context."""


@dataclass(frozen=True)
class Prompter:
    """Turns rows into prompts and answers for one model.

    With a chat template, the prompt is one user message and the generation prompt; without one, it
    is the bare text, for a decoder with a line break. Special tokens come from the template alone,
    so no prompt starts with two BOS tokens.

    Args:
        tokenizer: The model's tokenizer.
        context: Number of tokens that the model can attend to; None if there is no limit.
        is_encoder_decoder: Whether the prompt goes to an encoder.
    """

    tokenizer: Any
    context: int | None = None
    is_encoder_decoder: bool = False

    def prompt(self, task: Task, example: Example, new: int | None = None) -> Prompt:
        """Return a row's prompt. A passage that is too long is truncated, never the instruction.

        Args:
            task: The task.
            example: The row.
            new: Tokens that must fit after it; by default the task's ``max_new_tokens``.

        Raises:
            UsageError: The task needs a chat template that the tokenizer lacks, or the prompt is
                too long even without the passage.
        """
        ids = self._encode(task, task.render(example.fields))
        limit = self._limit(task.max_new_tokens if new is None else new)
        if limit is None or len(ids) <= limit:
            return Prompt(tuple(ids), shortened=False)
        whole = self._encode(task, task.render(example.fields, passage=""))
        if len(whole) >= limit:
            raise UsageError(
                f"Task {task.name}, row {example.id}: the prompt has {len(ids)} tokens, "
                f"{len(whole)} of them without the passage, and the model takes {limit}. Shorten "
                "the prompt, or name the field that may be shortened (passage)."
            )
        passage = self.tokenizer(task.passage_text(example.fields), add_special_tokens=False)
        kept = passage["input_ids"][: limit - len(whole)]
        while len(ids) > limit:  # tokenised together, the parts may need more tokens than apart
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            ids = self._encode(task, task.render(example.fields, passage=text))
            kept = kept[: len(kept) - max(1, len(ids) - limit)]
        return Prompt(tuple(ids), shortened=True)

    def answer(self, text: str) -> list[int]:
        """Return the token ids of an answer, with the end-of-sequence token."""
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
        """Return the chat template's tokens before a user's message.

        Returns:
            Token ids; empty if the tokenizer has no chat template, or the template no beginning.

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
            where: The task or model, for error messages.
            content: The user's message.
            answer: Whether to append the generation prompt.

        Raises:
            UsageError: The template is broken, or refuses the message.
        """
        from jinja2 import TemplateError  # noqa: PLC0415  (comes with transformers)

        try:
            text: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=answer,
                # A template reads the date from date_string or from strftime_now().
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
    """Return a chat-template prelude that redefines ``strftime_now`` with the pinned date."""
    parts = (
        f"replace('%{code}', '{PINNED_DATE.strftime('%' + code)}')" for code in "aAbBdHIjmMpSyY"
    )
    return (
        f"{{% macro strftime_now(format) %}}{{{{ format | {' | '.join(parts)} }}}}{{% endmacro %}}"
        "{{ '' }}"  # preserves a line break at the template's beginning
    )


_PINNED_CLOCK = _pinned_clock()
