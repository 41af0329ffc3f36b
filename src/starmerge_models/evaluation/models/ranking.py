"""Log-likelihoods of given continuations of prompts.

A model reads a prompt once, and then the **stems** of its continuations: a stem is a continuation
without its last token, unless it is a prefix of a longer stem. So one stem serves all continuations
that differ only in their last token. Continuations of a single token need no stem: their
likelihoods follow from the logits of the prompt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from starmerge_models.evaluation.models.batching import (
    BATCH_ROWS,
    PASS_TOKENS,
    Prompts,
    batches,
    check_prompts,
    padded,
)
from starmerge_models.evaluation.models.forward import check_finite, last_logits
from starmerge_models.evaluation.models.prefill import PrefixReader, prefix_reader

PASS_LOGITS = 2**26
"""Most entries of the logits of one pass over stems."""

Options: TypeAlias = Sequence[tuple[int, ...]]
"""The continuations of one prompt."""

Results: TypeAlias = Iterator[tuple[list[int], list[list[float]]]]
"""Indices of prompts, and the log-likelihoods of their continuations."""


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
        continuations: For each prompt, the token ids of its continuations.
        batch_size: Most texts in a batch; None: as many as fit.
        advance: Called with the number of prompts that were just completed.

    Returns:
        In nats, summed over the tokens of a continuation; 0 for an empty continuation.

    Raises:
        StarmergeError: A prompt is empty, or the model gives logits that are not finite.
    """
    if not prompts:
        return []
    check_prompts(prompts)
    options = [[tuple(tokens) for tokens in own] for own in continuations]
    new = max((len(tokens) for own in options for tokens in own), default=0)
    reader = prefix_reader(model, tokenizer, prompts, new=new)
    if reader is not None:
        results = _by_cache(reader, prompts, options, batch_size)
    elif model.config.is_encoder_decoder:
        results = _by_encoder(model, prompts, options, batch_size)
    else:
        results = _by_whole_texts(model, prompts, options, batch_size)
    totals: dict[int, list[float]] = {}
    for rows, found in results:
        check_finite(torch.tensor([sum(own) for own in found]), rows, model)
        totals.update(zip(rows, found, strict=True))
        advance(len(rows))
    return [totals[row] for row in range(len(prompts))]


def _by_cache(
    reader: PrefixReader, prompts: Prompts, options: Sequence[Options], batch_size: int | None
) -> Results:
    """Yield likelihoods from stems that continue the cache of their prompts."""
    for rows, texts, logits in reader.batches(prompts, batch_size):
        first = logits.log_softmax(-1, dtype=torch.float32)
        totals = [
            [float(steps[tokens[0]]) if tokens else 0.0 for tokens in options[row]]
            for row, steps in zip(rows, first, strict=True)
        ]
        most = min(batch_size or BATCH_ROWS, reader.most_rows(len(prompts[rows[0]])))
        stems = [stem for stem in _stems_of_batch(rows, options) if stem.tokens]
        for some in _chunks(stems, most, logits.shape[-1]):
            logits_of_stems = texts.select([stem.place for stem in some]).read(
                *padded([stem.tokens for stem in some], reader.pad, logits.device)
            )
            for stem, steps in _log_probabilities(some, logits_of_stems):
                for number in stem.numbers:
                    rest = options[rows[stem.place]][number][1:]
                    totals[stem.place][number] += float(steps[range(len(rest)), rest].sum())
        yield rows, totals


def _by_encoder(
    model: Any, prompts: Prompts, options: Sequence[Options], batch_size: int | None
) -> Results:
    """Yield likelihoods of a model whose encoder reads each prompt once, its decoder each stem."""
    start = model.generation_config.decoder_start_token_id
    for rows in batches(prompts, batch_size):
        ids, mask = padded([prompts[row] for row in rows], 0, model.device)
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        totals = [[0.0] * len(options[row]) for row in rows]
        most = min(batch_size or BATCH_ROWS, max(1, PASS_TOKENS // ids.shape[1]))
        stems = _stems_of_batch(rows, options)
        for some in _chunks(stems, most, model.config.get_text_config(decoder=True).vocab_size):
            places = torch.tensor([stem.place for stem in some], device=ids.device)
            decoder_ids, _ = padded([(start, *stem.tokens) for stem in some], 0, ids.device)
            logits = model(
                encoder_outputs=(encoded[places],),
                attention_mask=mask[places].long(),
                decoder_input_ids=decoder_ids,
                use_cache=False,
            ).logits
            for stem, steps in _log_probabilities(some, logits):
                for number in stem.numbers:
                    tokens = options[rows[stem.place]][number]
                    totals[stem.place][number] = float(steps[range(len(tokens)), tokens].sum())
        yield rows, totals


def _by_whole_texts(
    model: Any, prompts: Prompts, options: Sequence[Options], batch_size: int | None
) -> Results:
    """Yield likelihoods of a causal model that reads each stem together with its prompt.

    Padding is on the right, where it does not affect a causal model.
    """
    for row, prompt in enumerate(prompts):
        totals = [0.0] * len(options[row])
        most = batch_size or max(1, PASS_TOKENS // len(prompt))
        vocabulary = model.config.get_text_config().vocab_size
        for some in _chunks(_stems_of_batch([row], options), most, vocabulary):
            ids, _ = padded([(*prompt, *stem.tokens) for stem in some], 0, model.device)
            logits = model(
                input_ids=ids, **last_logits(model, ids.shape[1] - len(prompt) + 1)
            ).logits
            behind = logits[:, len(prompt) - 1 - ids.shape[1] :]
            for stem, steps in _log_probabilities(some, behind):
                for number in stem.numbers:
                    tokens = options[row][number]
                    totals[number] = float(steps[range(len(tokens)), tokens].sum())
        yield [row], [totals]


@dataclass(frozen=True)
class _Stem:
    """Tokens that a model reads after a prompt.

    Args:
        place: The index of the prompt in its batch.
        tokens: Token ids; empty if all continuations have one token.
        numbers: The indices of the continuations that the stem serves.
    """

    place: int
    tokens: tuple[int, ...]
    numbers: list[int]


def _stems_of_batch(rows: Sequence[int], options: Sequence[Options]) -> list[_Stem]:
    """Return the stems of the continuations of some prompts, the longest first."""
    stems = [
        _Stem(place, tokens, numbers)
        for place, row in enumerate(rows)
        for tokens, numbers in _stems(options[row]).items()
    ]
    return sorted(stems, key=lambda stem: len(stem.tokens), reverse=True)


def _chunks(stems: list[_Stem], most: int, vocabulary: int) -> Iterator[list[_Stem]]:
    """Yield the stems of each pass.

    Args:
        stems: The stems, the longest first.
        most: Most stems of a pass.
        vocabulary: Size of the vocabulary.
    """
    while stems:
        size = min(most, PASS_LOGITS // (max(1, len(stems[0].tokens)) * vocabulary))
        yield stems[: max(1, size)]
        stems = stems[max(1, size) :]


def _log_probabilities(stems: Sequence[_Stem], logits: Tensor) -> Iterator[tuple[_Stem, Tensor]]:
    """Yield each stem with its log-probabilities (tokens, vocabulary), in float32."""
    return zip(stems, logits.log_softmax(-1, dtype=torch.float32), strict=True)


def _stems(options: Options) -> dict[tuple[int, ...], list[int]]:
    """Return the stems of continuations, and the indices of the continuations each stem serves."""
    heads = sorted({tokens[:-1] for tokens in options})
    # In sorted order, the heads that begin with another head directly follow it.
    stems = [
        head
        for head, after in zip(heads, [*heads[1:], None], strict=False)
        if after is None or after[: len(head)] != head
    ]
    served: dict[tuple[int, ...], list[int]] = {stem: [] for stem in stems}
    for number, tokens in enumerate(options):
        served[stems[bisect_left(stems, tokens[:-1])]].append(number)
    return served
