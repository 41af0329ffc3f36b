"""Prefill with a shared prefix: prompts in a decoder's cache, from which both scorers continue.

A decoder reads the common prefix of all prompts (a chat template's head, an instruction) once, and
the reader copies its keys and values into every row. The model reads the rest of the prompts in
passes of similar length. The reader then concatenates the caches of several passes, because the
tokens that follow are cheaper in a larger batch. Padding is on the left of a prompt's rest and
masked, and every token gets its own position, so each row is computed as if it were alone.

This needs a decoder whose cache holds keys and values alone. For any other model (Mamba; models
whose rows depend on the batch) :func:`prefix_reader` returns None, and the scorers use
``model.generate`` or whole texts. ``benchmarks/evaluation.py`` measures the gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from starmerge_models.evaluation.models.batching import (
    BATCH_ROWS,
    PASS_TOKENS,
    Prompts,
    by_length,
    padded,
)
from starmerge_models.evaluation.models.caches import (
    bytes_of,
    concatenate_caches,
    concatenate_rows,
    holds_only_keys_and_values,
    narrowest_window,
    select_rows,
)
from starmerge_models.evaluation.models.forward import arguments_of, cache_name, last_logits

PASS_PADDING = 64
"""Most padding tokens in one pass. Reading this many takes about as long as starting a pass."""

BATCH_BYTES = 2**31
"""Memory for a batch's keys and values, in bytes."""


class CachedTexts:
    """Texts that a decoder has read, one per row, in its cache.

    Args:
        model: The decoder.
        cache: Keys and values of all columns; None before the model has read any token.
        mask: Which columns are not padding, (rows, columns), booleans.
    """

    def __init__(self, model: Any, cache: Any, mask: Tensor) -> None:
        self.model = model
        self.cache = cache
        self.mask = mask

    @classmethod
    def empty(cls, model: Any) -> CachedTexts:
        """Return one text without tokens."""
        return cls(model, None, torch.zeros((1, 0), dtype=torch.bool, device=model.device))

    def select(self, rows: Sequence[int]) -> CachedTexts:
        """Return a new object with some of the rows; an index may occur repeatedly."""
        index = torch.tensor(rows, device=self.mask.device)
        cache = None if self.cache is None else select_rows(self.cache, index)
        return CachedTexts(self.model, cache, self.mask[index])

    def read(self, tokens: Tensor, mask: Tensor, *, last: bool = False) -> Tensor:
        """Run the model on more tokens of every row.

        Args:
            tokens: Token ids, (rows, new).
            mask: Which tokens are not padding, (rows, new), booleans.
            last: Whether to return only the last column's logits.

        Returns:
            The logits after each token, (rows, new or 1, vocabulary).
        """
        positions = self.mask.sum(-1, keepdim=True) + mask.cumsum(-1) - 1
        self.mask = torch.cat([self.mask, mask], dim=1)
        name = str(cache_name(self.model))
        output = self.model(
            input_ids=tokens,
            attention_mask=self.mask.long(),
            position_ids=positions.clamp(min=0),
            use_cache=True,
            **{name: self.cache},
            **(last_logits(self.model, 1) if last else {}),
        )
        self.cache = getattr(output, name, None)
        logits: Tensor = output.logits
        return logits[:, -1:] if last else logits


def concatenate_texts(parts: Sequence[CachedTexts]) -> CachedTexts:
    """Return the rows of several objects of one model."""
    return CachedTexts(
        parts[0].model,
        concatenate_caches([part.cache for part in parts]),
        concatenate_rows([part.mask for part in parts], 1),
    )


class PrefixReader:
    """Reads prompts after the prefix that all of them share.

    Args:
        model: The decoder.
        pad: Token id of padding.
        new: Most tokens that will follow a prompt.
        token_bytes: Memory of the keys and values of one token, in bytes.
        prefix: The prefix, one row, which may be empty.
    """

    def __init__(
        self, model: Any, pad: int, new: int, token_bytes: int, prefix: CachedTexts
    ) -> None:
        self.model = model
        self.pad = pad
        self._new = new
        self._token_bytes = token_bytes
        self._prefix = prefix
        self._prefix_length = prefix.mask.shape[1]

    def most_rows(self, length: int) -> int:
        """Return how many prompts of a length fit in memory, with the tokens to follow."""
        return min(BATCH_ROWS, BATCH_BYTES // ((length + self._new) * self._token_bytes))

    def batches(
        self, prompts: Prompts, batch_size: int | None
    ) -> Iterator[tuple[list[int], CachedTexts, Tensor]]:
        """Yield batches of prompts, the longest first.

        Yields:
            The indices of a batch's prompts; the prompts in the cache; the logits of the token
            after each prompt, (rows, vocabulary).
        """
        lengths = [len(prompt) - self._prefix_length for prompt in prompts]
        order = by_length(prompts)
        while order:
            limit = self.most_rows(len(prompts[order[0]]))
            size = max(1, min(limit, batch_size or BATCH_ROWS))
            rows, order = order[:size], order[size:]
            passes = [
                self._read([prompts[row] for row in part]) for part in passes_of(rows, lengths)
            ]
            texts, logits = zip(*passes, strict=True)
            yield rows, concatenate_texts(texts), torch.cat(logits)

    def _read(self, prompts: Prompts) -> tuple[CachedTexts, Tensor]:
        texts = self._prefix.select([0] * len(prompts))
        rests = [prompt[self._prefix_length :] for prompt in prompts]
        tokens, mask = padded(rests, self.pad, self.model.device, left=True)
        return texts, texts.read(tokens, mask, last=True)[:, -1]


def prefix_reader(model: Any, tokenizer: Any, prompts: Prompts, *, new: int) -> PrefixReader | None:
    """Return the reader of some prompts; None if the model does not allow one.

    Args:
        model: A causal or an encoder-decoder language model.
        tokenizer: Its tokenizer. Without a padding token, token 0 is used, masked.
        prompts: All prompts, at least one, none of them empty.
        new: Most tokens that will follow a prompt.
    """
    lengths = [len(prompt) for prompt in prompts]
    if (
        model.config.is_encoder_decoder
        or "position_ids" not in arguments_of(model)
        or cache_name(model) is None
        or _rows_depend_on_batch(model, max(lengths) + new)
    ):
        return None
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Every prompt keeps at least one token to read: its logits predict the first new token.
    shared = _common_prefix(prompts)[: min(lengths) - 1]
    prefix = CachedTexts.empty(model)
    prefix.read(*padded([shared or prompts[0][:1]], pad, model.device))
    if not holds_only_keys_and_values(prefix.cache):
        return None
    token_bytes = bytes_of(prefix.cache) // prefix.mask.numel()
    # A sliding window counts columns, including padding. If it is narrower than a text, there must
    # be no padding inside the text, so the prefix is left empty and all padding precedes the text.
    if not shared or max(lengths) + new > narrowest_window(prefix.cache):
        prefix = CachedTexts.empty(model)
    return PrefixReader(model, pad, new, token_bytes, prefix)


def passes_of(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield consecutive rows that fit into one pass with little padding.

    Args:
        rows: Indices of prompts, the longest first.
        lengths: How many tokens of each prompt the model has to read.
    """
    part: list[int] = []
    padding = 0
    for row in rows:
        width = lengths[part[0]] if part else lengths[row]
        padding += width - lengths[row]
        if part and (padding > PASS_PADDING or (len(part) + 1) * width > PASS_TOKENS):
            yield part
            part, padding = [], 0
        part.append(row)
    if part:
        yield part


def _rows_depend_on_batch(model: Any, length: int) -> bool:
    """Return whether a row's logits depend on the other rows, or on how it is split into passes.

    Args:
        model: A decoder.
        length: Tokens of the longest text.

    Returns:
        True for rotary frequencies that depend on the longest row of a pass, if a text is longer
        than the model's original context; and for windows over columns without support in the
        cache (GPT-Neo).
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    made_for = (
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
        if rope.get("rope_type") in ("dynamic", "longrope")
        else math.inf
    )
    return length > made_for or "local" in getattr(config, "attention_layers", ())


def _common_prefix(prompts: Prompts) -> list[int]:
    """Return the longest common prefix of all prompts."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    pairs = zip(first, last, strict=False)
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
