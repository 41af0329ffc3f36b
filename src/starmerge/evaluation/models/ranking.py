"""How likely a model finds given continuations of prompts.

A prompt is read once, and its continuations go on from there. Of these only **stems** are read: a
stem is a continuation without its last token, unless a longer one begins with it. So continuations
that differ in their last token alone are read once, and single tokens not at all: how likely they
are stands in the logits of the prompt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from starmerge.evaluation.models.prefill import (
    BATCH_ROWS,
    PASS_TOKENS,
    Prompts,
    Reader,
    finite,
    last_logits,
    padded,
    reader,
)

PASS_LOGITS = 2**26
"""Entries of the logits of one pass over stems."""

Options: TypeAlias = Sequence[tuple[int, ...]]
"""The continuations of one prompt."""


@torch.inference_mode()
def log_likelihoods(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    continuations: Sequence[Prompts],
    *,
    batch_size: int | None,
    advance: Callable[[int], None],
) -> list[list[float]]:
    """Return the log-probability of each continuation of each prompt.

    Args:
        model: A causal or an encoder-decoder language model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        continuations: For each prompt, the token ids of what may follow it.
        batch_size: Most texts in a batch; None: as many as there is room for.
        advance: Called with a number of prompts that are done.

    Returns:
        In nats, summed over the tokens of a continuation; 0 for one without tokens.

    Raises:
        StarmergeError: A prompt is empty, or the model gives logits that are not finite.
    """
    if not prompts:
        return []
    options = [[tuple(tokens) for tokens in own] for own in continuations]
    new = max((len(tokens) for own in options for tokens in own), default=0)
    reads = reader(model, tokenizer, prompts, new=new)
    totals: dict[int, list[float]] = {}
    for rows, found in (
        _whole(model, prompts, options, batch_size)
        if reads is None
        else _continued(reads, prompts, options, batch_size)
    ):
        finite(torch.tensor([sum(own) for own in found]), rows, model)
        totals.update(zip(rows, found, strict=True))
        advance(len(rows))
    return [totals[row] for row in range(len(prompts))]


def _continued(
    reads: Reader, prompts: Prompts, options: Sequence[Options], batch_size: int | None
) -> Iterator[tuple[list[int], list[list[float]]]]:
    """Yield the numbers of some prompts and the log-probabilities of their continuations."""
    for rows, texts, logits in reads.batches(prompts, batch_size):
        first = logits.log_softmax(-1, dtype=torch.float32)
        totals = [
            [float(steps[tokens[0]]) if tokens else 0.0 for tokens in options[row]]
            for row, steps in zip(rows, first, strict=True)
        ]
        # The place of a prompt in the batch, a stem of its continuations, and their numbers.
        stems = [
            (place, stem, numbers)
            for place, row in enumerate(rows)
            for stem, numbers in _stems(options[row]).items()
            if stem
        ]
        stems.sort(key=lambda entry: len(entry[1]), reverse=True)
        room = min(batch_size or BATCH_ROWS, reads.room(len(prompts[rows[0]])))
        while stems:
            size = min(room, PASS_LOGITS // (len(stems[0][1]) * logits.shape[-1]))
            some, stems = stems[: max(1, size)], stems[max(1, size) :]
            read = texts.chosen([place for place, _, _ in some]).read(
                *padded([stem for _, stem, _ in some], reads.pad, logits.device)
            )
            for (place, _, numbers), steps in zip(
                some, read.log_softmax(-1, dtype=torch.float32), strict=True
            ):
                for number in numbers:
                    rest = options[rows[place]][number][1:]
                    totals[place][number] += float(steps[range(len(rest)), rest].sum())
        yield rows, totals


def _whole(
    model: Any, prompts: Prompts, options: Sequence[Options], batch_size: int | None
) -> Iterator[tuple[list[int], list[list[float]]]]:
    """Yield the same, each stem read together with its prompt.

    Padding stands behind all that counts, where a causal model does not see it.
    """
    for row, prompt in enumerate(prompts):
        totals = [0.0] * len(options[row])
        stems = list(_stems(options[row]).items())
        size = batch_size or max(1, PASS_TOKENS // len(prompt))
        for start in range(0, len(stems), size):
            some = stems[start : start + size]
            ids, _ = padded([[*prompt, *stem] for stem, _ in some], 0, model.device)
            logits = model(
                input_ids=ids, **last_logits(model, ids.shape[1] - len(prompt) + 1)
            ).logits
            behind = logits[:, len(prompt) - 1 - ids.shape[1] :].log_softmax(
                -1, dtype=torch.float32
            )
            for (_, numbers), steps in zip(some, behind, strict=True):
                for number in numbers:
                    tokens = options[row][number]
                    totals[number] = float(steps[range(len(tokens)), tokens].sum())
        yield [row], [totals]


def _stems(options: Options) -> dict[tuple[int, ...], list[int]]:
    """Return what of some continuations has to be read, and for which of them (their numbers)."""
    heads = sorted({tokens[:-1] for tokens in options})
    # In this order, all that begins with a head stands right behind it.
    stems = [
        head
        for head, after in zip(heads, [*heads[1:], None], strict=False)
        if after is None or after[: len(head)] != head
    ]
    served: dict[tuple[int, ...], list[int]] = {stem: [] for stem in stems}
    for number, tokens in enumerate(options):
        served[stems[bisect_left(stems, tokens[:-1])]].append(number)
    return served
