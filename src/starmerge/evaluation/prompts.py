"""How a row becomes tokens: the chat template, the instruction, the answer.

One place for training and evaluation, so that an adapter is asked as it was taught.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starmerge.evaluation.task import Example, Task

MAX_PROMPT_TOKENS = 1024
"""Longest prompt. A longer input loses its own end, never the instruction or the template."""

PINNED_DATE = "01 Jan 2025"
"""Date given to chat templates that print one, so that a score does not depend on the day."""


@dataclass(frozen=True)
class Prompter:
    """Turns rows into prompts and answers for one tokenizer.

    A tokenizer with a chat template gets the row as one user message and the generation prompt; one
    without gets the bare text and a line break. Special tokens come from the template alone, so
    no prompt starts with two BOS tokens.
    """

    tokenizer: Any

    def prompt(self, task: Task, example: Example) -> list[int]:
        """Return the token ids of a row's prompt, at most :data:`MAX_PROMPT_TOKENS` of them."""
        ids = self._encode(task.instruction, example.input)
        excess = len(ids) - MAX_PROMPT_TOKENS
        if excess > 0:
            text = self.tokenizer(example.input, add_special_tokens=False)["input_ids"]
            kept = self.tokenizer.decode(text[: max(0, len(text) - excess)])
            ids = self._encode(task.instruction, kept)
        return ids

    def answer(self, text: str) -> list[int]:
        """Return the token ids of an answer, ended by the end-of-sequence token."""
        lead = "" if self.tokenizer.chat_template else " "
        ids: list[int] = self.tokenizer(lead + text, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def _encode(self, instruction: str, text: str) -> list[int]:
        content = f"{instruction}\n{text}" if instruction else text
        if not self.tokenizer.chat_template:
            ids: list[int] = self.tokenizer(content + "\n")["input_ids"]
            return ids
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            date_string=PINNED_DATE,
        )
        chat: list[int] = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return chat
