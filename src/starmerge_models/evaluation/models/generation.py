"""Greedy decoding of many prompts at once.

A row leaves its batch when it is finished, at the end of its text or of its answer; the others go
on without it. A prompt gets the text that ``model.generate`` writes for it alone. Models without a
:class:`~starmerge_models.evaluation.models.prefill.PrefixReader` are left to ``model.generate``.
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
    """What is written for one prompt.

    Args:
        tokenizer: The model's tokenizer.
        ends: Tokens that end a text.
        is_final: Tells of a text whether the rest of it may be left out.
    """

    def __init__(self, tokenizer: Any, ends: set[int], is_final: Callable[[str], bool]) -> None:
        self.text = ""
        self.done = False
        self._tokens: list[int] = []
        self._tokenizer = tokenizer
        self._ends = ends
        self._is_final = is_final

    def add(self, token: int) -> None:
        """Go on with a token, unless the response is done."""
        if self.done or token in self._ends:
            self.done = True
            return
        self._tokens.append(token)
        # Without the cleaning of spaces before punctuation, a text only ever grows.
        self.text = self._tokenizer.decode(
            self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        # Bytes of a character that is not complete are shown as this one.
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
    """Return what a model writes after each prompt, special tokens left out.

    Args:
        model: A causal or an encoder-decoder language model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        max_new_tokens: Length of a response, at most.
        is_final: Tells of the text so far whether the rest of it may be left out.
        batch_size: Most prompts in a batch; None: as many as there is room for.
        advance: Called with a number of prompts that are done.

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
        # An encoder masks padding. A decoder without a reader may not (Mamba), so it gets none.
        equal_lengths = not model.config.is_encoder_decoder
        for rows in batches(prompts, batch_size, equal_lengths=equal_lengths):
            some = [prompts[row] for row in rows]
            _generate_by_library(model, some, rows, responses, max_new_tokens)
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
        texts: The prompts of the batch, in its cache.
        logits: Those of the token that follows each prompt, (rows, vocabulary).
        rows: The numbers of the prompts.
        responses: Those of all prompts.
        max_new_tokens: Length of a response, at most.
        advance: Called with a number of prompts that are done.
    """
    for step in range(1, max_new_tokens + 1):
        values, best = logits.max(-1)
        check_finite(values, rows, model)
        for row, token in zip(rows, best.tolist(), strict=True):
            responses[row].add(token)
        if step == max_new_tokens:
            break
        going = [place for place, row in enumerate(rows) if not responses[row].done]
        if len(going) < len(rows):
            advance(len(rows) - len(going))
            if not going:
                return
            rows = [rows[place] for place in going]
            texts = texts.select(going)
            best = best[going]
        tokens = best[:, None]
        logits = texts.read(tokens, torch.ones_like(tokens, dtype=torch.bool))[:, -1]
    advance(len(rows))


def _generate_by_library(
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
        rows: Their numbers.
        responses: Those of all prompts.
        max_new_tokens: Length of a response, at most.
    """
    ids, real = padded(prompts, 0, model.device)

    def check(_: Tensor, scores: Tensor) -> Tensor:
        check_finite(scores.max(-1).values, rows, model)
        return scores

    def add(sequences: Tensor, _: object) -> Tensor:
        for row, token in zip(rows, sequences[:, -1].tolist(), strict=True):
            responses[row].add(token)
        return torch.tensor([responses[row].done for row in rows], device=ids.device)

    model.generate(
        input_ids=ids,
        attention_mask=real.long(),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        logits_processor=[check],
        stopping_criteria=[add],
    )
