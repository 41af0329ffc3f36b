"""Batched greedy decoding.

A row is removed from its batch when it is finished, by its end-of-sequence token or a final answer.
Each prompt gets the text that ``model.generate`` would return for this prompt alone. Models without
a :class:`~starmerge_models.evaluation.models.prefill.PrefixReader` use ``model.generate``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from starmerge_models.evaluation.models.batching import Prompts, batches, check_prompts, padded
from starmerge_models.evaluation.models.forward import check_finite
from starmerge_models.evaluation.models.prefill import CachedTexts, prefix_reader


class _Response:
    """The response to one prompt.

    Args:
        tokenizer: The model's tokenizer.
        ends: End-of-sequence tokens.
        is_final: Returns whether generation may stop after a text.
    """

    def __init__(self, tokenizer: Any, ends: set[int], is_final: Callable[[str], bool]) -> None:
        self.text = ""
        self.done = False
        self._tokens: list[int] = []
        self._tokenizer = tokenizer
        self._ends = ends
        self._is_final = is_final

    def add(self, token: int) -> None:
        """Append a token, unless the response is done."""
        if self.done or token in self._ends:
            self.done = True
            return
        self._tokens.append(token)
        # Cleaning up spaces before punctuation would change text that was already decoded.
        self.text = self._tokenizer.decode(
            self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        # The decoder returns U+FFFD for the bytes of an incomplete character.
        self.done = not self.text.endswith("\ufffd") and self._is_final(self.text)


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    is_final: Callable[[str], bool],
    batch_size: int | None,
    advance: Callable[[int], None],
) -> list[str]:
    """Return the greedy continuation of each prompt, without special tokens.

    Args:
        model: A causal or an encoder-decoder language model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        max_new_tokens: Most tokens of a response.
        is_final: Returns whether generation may stop after a text.
        batch_size: Most prompts in a batch; None: as many as fit.
        advance: Called with the number of prompts that were just completed.

    Raises:
        StarmergeError: A prompt is empty, or the model gives logits that are not finite.
    """
    if not prompts:
        return []
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    check_prompts(prompts)
    responses = [_Response(tokenizer, ends, is_final) for _ in prompts]
    reader = prefix_reader(model, tokenizer, prompts, new=max_new_tokens)
    if reader is None:
        # An encoder masks padding. A decoder without a reader may not (Mamba): it gets no padding.
        equal_lengths = not model.config.is_encoder_decoder
        for rows in batches(prompts, batch_size, equal_lengths=equal_lengths):
            some = [prompts[row] for row in rows]
            _generate_with_transformers(model, some, rows, responses, max_new_tokens)
            advance(len(rows))
    else:
        for rows, texts, logits in reader.batches(prompts, batch_size):
            _generate_from_cache(model, texts, logits, rows, responses, max_new_tokens, advance)
    return [response.text for response in responses]


def _generate_from_cache(
    model: Any,
    texts: CachedTexts,
    logits: Tensor,
    rows: list[int],
    responses: Sequence[_Response],
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> None:
    """Add tokens to the responses of a batch until every response is done.

    Args:
        model: The decoder.
        texts: The prompts of the batch, in the model's cache.
        logits: Logits of the token after each prompt, (rows, vocabulary).
        rows: The indices of the prompts.
        responses: The responses of all prompts.
        max_new_tokens: Most tokens of a response.
        advance: Called with the number of prompts that were just completed.
    """
    for step in range(1, max_new_tokens + 1):
        values, best = logits.max(-1)
        check_finite(values, rows, model)
        for row, token in zip(rows, best.tolist(), strict=True):
            responses[row].add(token)
        if step == max_new_tokens:
            break
        unfinished = [place for place, row in enumerate(rows) if not responses[row].done]
        if len(unfinished) < len(rows):
            advance(len(rows) - len(unfinished))
            if not unfinished:
                return
            rows = [rows[place] for place in unfinished]
            texts = texts.select(unfinished)
            best = best[unfinished]
        tokens = best[:, None]
        logits = texts.read(tokens, torch.ones_like(tokens, dtype=torch.bool))[:, -1]
    advance(len(rows))


def _generate_with_transformers(
    model: Any,
    prompts: Prompts,
    rows: list[int],
    responses: Sequence[_Response],
    max_new_tokens: int,
) -> None:
    """Add tokens to the responses of a batch by ``model.generate``.

    The library computes finished rows until all rows of the batch are finished.

    Args:
        model: The model.
        prompts: The prompts of the batch.
        rows: The indices of the prompts.
        responses: The responses of all prompts.
        max_new_tokens: Most tokens of a response.
    """
    ids, mask = padded(prompts, 0, model.device)

    def check(_: Tensor, scores: Tensor) -> Tensor:
        check_finite(scores.max(-1).values, rows, model)
        return scores

    def add(sequences: Tensor, _: object) -> Tensor:
        for row, token in zip(rows, sequences[:, -1].tolist(), strict=True):
            responses[row].add(token)
        return torch.tensor([responses[row].done for row in rows], device=ids.device)

    model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        logits_processor=[check],
        stopping_criteria=[add],
    )
