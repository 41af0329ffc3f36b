"""The two scorers: greedy generation and likelihood ranking.

Each asks one loaded model all rows of one task and returns one :class:`Answer` a row. Rows are
batched by length and results come back in the order of the rows; neither the batch size nor the
order changes what is computed, up to the rounding of the model's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starmerge.evaluation.prompts import Prompter
from starmerge.evaluation.task import Example, Task

MAX_NEW_TOKENS = 10
"""Length of an answer under the paper's rule (arXiv 2502.10339)."""

BATCH_TOKENS = 4096
"""Tokens in one batch, padding included."""


@dataclass(frozen=True)
class Answer:
    """What a model said to one row."""

    text: str
    """The generated text, or the label with the highest likelihood."""
    right: bool
    parsed: bool
    """Whether an answer could be read at all; always true for likelihood ranking."""


Scorer = Callable[[Any, Any, Task, Sequence[Example], Callable[[int], None]], list[Answer]]
"""``scorer(model, tokenizer, task, examples, advance)``; ``advance(n)`` reports n rows done."""


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    advance: Callable[[int], None],
) -> list[Answer]:
    """Score by greedy generation of at most :data:`MAX_NEW_TOKENS` tokens.

    A response is right when the right answer stands in it as a whole word (:meth:`Task.is_right`);
    it is unparsed when no answer can be read from it.
    """
    prompter = Prompter(tokenizer)
    prompts = [prompter.prompt(task, example) for example in examples]
    answers: dict[int, Answer] = {}
    for batch in _batches(prompts, [1] * len(prompts)):
        ids, mask = _left_padded(
            [prompts[row] for row in batch], tokenizer.pad_token_id, model.device
        )
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for row, text in zip(batch, texts, strict=True):
            right = task.is_right(text, examples[row])
            parsed = right or task.read(text) is not None
            answers[row] = Answer(text.strip(), right, parsed)
        advance(len(batch))
    return [answers[row] for row in range(len(examples))]


@torch.inference_mode()
def rank(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    advance: Callable[[int], None],
) -> list[Answer]:
    """Score by likelihood ranking: the choice with the highest log-probability is the answer.

    The log-probability of a choice is the sum over its tokens and the end-of-sequence token, given
    the prompt; without the end, a choice that begins another would always win against it. The
    prompt runs once a row, its key-value cache is shared by the row's choices.
    """
    prompter = Prompter(tokenizer)
    prompts = [prompter.prompt(task, example) for example in examples]
    choices = [[prompter.answer(choice) for choice in example.choices] for example in examples]
    answers: dict[int, Answer] = {}
    for batch in _batches(prompts, [len(options) for options in choices]):
        scores = _log_likelihoods(
            model,
            [prompts[row] for row in batch],
            [choices[row] for row in batch],
            tokenizer.pad_token_id,
        )
        for row, likelihoods in zip(batch, scores, strict=True):
            best = examples[row].choices[int(likelihoods.argmax())]
            answers[row] = Answer(best, best == examples[row].label, parsed=True)
        advance(len(batch))
    return [answers[row] for row in range(len(examples))]


SCORERS: dict[str, Scorer] = {"generate": generate, "rank": rank}
"""The scorers by the name the command line gives them."""


def _log_likelihoods(
    model: Any, prompts: list[list[int]], choices: list[list[list[int]]], pad: int
) -> list[Tensor]:
    """Return, for each row, the log-probability (nats) of each of its choices."""
    device = model.device
    ids, mask = _left_padded(prompts, pad, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    prefill = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, use_cache=True
    )
    first = prefill.logits[:, -1].float().log_softmax(-1)
    flat = [choice for options in choices for choice in options]
    width = max(map(len, flat))
    owners, lengths, tokens = (
        torch.tensor(values, device=device)
        for values in (
            [row for row, options in enumerate(choices) for _ in options],
            [len(choice) for choice in flat],
            [choice + [pad] * (width - len(choice)) for choice in flat],
        )
    )
    total = first[owners, tokens[:, 0]]
    if width > 1:
        # The cache of each row, once for each of its choices; the choices but their last tokens.
        cache = prefill.past_key_values
        cache.batch_select_indices(owners)
        steps = torch.arange(width - 1, device=device)
        real = steps < lengths[:, None] - 1
        logits = model(
            input_ids=tokens[:, :-1],
            attention_mask=torch.cat([mask[owners], real.long()], dim=1),
            position_ids=positions[owners, -1:] + 1 + steps,
            past_key_values=cache,
        ).logits
        gains = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        total = total + (gains * real).sum(-1)
    return list(total.split([len(options) for options in choices]))


def _batches(prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Iterator[list[int]]:
    """Yield row numbers, longest prompts first, at most :data:`BATCH_TOKENS` tokens a batch.

    ``copies`` says how often a row's prompt stands in memory (its choices share one forward pass,
    but each has a copy of the cache).
    """
    batch: list[int] = []
    width = cost = 0
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True):
        share = max(1, copies[row] // 2)
        if batch and (cost + share) * width > BATCH_TOKENS:
            yield batch
            batch, cost = [], 0
        if not batch:
            width = len(prompts[row])
        batch.append(row)
        cost += share
    if batch:
        yield batch


def _left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, both (rows, longest), padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
