"""Prompts that a model has read and that go on from there: what both scorers rest on.

The tokens with which all prompts begin (a chat template's head, an instruction) are read once, and
their keys and values are copied into every row. The rest is read in passes of similar length, which
are then joined, as more rows at once make the tokens that follow cheaper. Padding stands before
that rest, and is masked; every token is given its own position; so a row is computed as if alone.

That needs a memory of keys and values, as attention has. For a model with another one (Mamba) there
is no :class:`Reader`, and the scorers have a plainer way without padding before a text.
"""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad as extended

from starmerge.errors import StarmergeError

PASS_TOKENS = 4096
"""Tokens that one pass reads, padding included."""

PASS_PADDING = 64
"""Padding in one pass: about as many tokens as the time of one more pass would read."""

BATCH_ROWS = 256
"""Rows of a batch."""

BATCH_BYTES = 2**31
"""Memory for a batch's keys and values."""

Prompts = Sequence[Sequence[int]]
"""Token ids, a sequence for each prompt."""

T = TypeVar("T", bound="Texts")


class Texts(ABC):
    """What a model has read so far, one text a row."""

    @abstractmethod
    def chosen(self: T, rows: Sequence[int]) -> T:
        """Return some of the rows, each as often as it is named; this object stays as it is."""

    @abstractmethod
    def joined(self: T, others: Sequence[T]) -> T:
        """Return the rows of this object, then those of others."""

    @abstractmethod
    def read(self, tokens: Tensor, real: Tensor, *, last: bool = False) -> Tensor:
        """Read some more tokens of every row.

        Args:
            tokens: Token ids, (rows, new).
            real: Which of them are not padding, (rows, new), booleans.
            last: Whether the last column's logits are enough.

        Returns:
            What the model expects after each token: logits, (rows, new or 1, vocabulary).
        """


class Reader(ABC):
    """Reads prompts.

    Args:
        model: The model.
        pad: Token id of padding.
        new: How many tokens will follow a prompt, at most.
        token_bytes: Memory of the keys and values of one token.
    """

    shared = 0
    """How many tokens, with which all prompts begin, need not be read again."""

    def __init__(self, model: Any, pad: int, new: int, token_bytes: int) -> None:
        self.model = model
        self.pad = pad
        self._new = new
        self._token_bytes = token_bytes

    @abstractmethod
    def read(self, prompts: Prompts) -> tuple[Texts, Tensor]:
        """Read prompts in one pass.

        Returns:
            The texts, and the logits of what follows each of them, (rows, vocabulary).
        """

    def room(self, length: int) -> int:
        """Return how many texts with prompts of some length can be gone on with at once."""
        return min(BATCH_ROWS, BATCH_BYTES // ((length + self._new) * self._token_bytes))

    def batches(
        self, prompts: Prompts, batch_size: int | None
    ) -> Iterator[tuple[list[int], Texts, Tensor]]:
        """Yield the numbers of the prompts of a batch and what :meth:`read` returns for them."""
        lengths = [len(prompt) - self.shared for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda row: lengths[row], reverse=True)
        while order:
            size = max(1, min(self.room(len(prompts[order[0]])), batch_size or BATCH_ROWS))
            rows, order = order[:size], order[size:]
            passes = passes_of(rows, lengths)
            read = [self.read([prompts[row] for row in part]) for part in passes]
            texts, logits = zip(*read, strict=True)
            yield rows, texts[0].joined(texts[1:]), torch.cat(logits)


def passes_of(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield neighbours that can be read at once without much padding.

    Args:
        rows: Numbers of prompts, the longest first.
        lengths: How many tokens of each prompt there are to read.
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


def equal_lengths(prompts: Prompts, batch_size: int | None) -> Iterator[list[int]]:
    """Yield the numbers of some prompts of one length, the longest first."""
    lengths = [len(prompt) for prompt in prompts]
    for length in sorted(set(lengths), reverse=True):
        rows = [row for row, other in enumerate(lengths) if other == length]
        size = min(max(1, PASS_TOKENS // length), batch_size or BATCH_ROWS)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def reader(model: Any, tokenizer: Any, prompts: Prompts, *, new: int) -> Reader | None:
    """Return what reads these prompts; None where the model's memory is not of keys and values.

    Args:
        model: A causal or an encoder-decoder language model.
        tokenizer: Its tokenizer. Where it has no token for padding, any will do, as it is masked.
        prompts: All prompts there are, at least one.
        new: How many tokens will follow a prompt, at most.

    Raises:
        StarmergeError: A prompt is empty.
    """
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise StarmergeError(f"Prompt {row} has no tokens. A model must be asked something.")
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if model.config.is_encoder_decoder:
        token, _ = _encode(model, [prompts[0][:1]], pad)
        return _EncoderReader(model, pad, new, _bytes(token.cache.cross_attention_cache))
    lengths = [len(prompt) for prompt in prompts]
    if "position_ids" not in arguments_of(model) or _minds_its_neighbours(
        model, max(lengths) + new
    ):
        return None
    beginning = _beginning(prompts)[: min(lengths) - 1]
    texts = _CausalTexts.none(model)
    texts.read(*padded([beginning or prompts[0][:1]], pad, model.device))
    if not _keeps_keys_and_values(texts.cache):
        return None
    token_bytes = _bytes(texts.cache) // texts.real.numel()
    # A window counts columns: where it ends within a text, padding must stand before the text.
    if not beginning or max(lengths) + new > _window(texts.cache):
        texts = _CausalTexts.none(model)
    return _CausalReader(model, pad, new, token_bytes, texts)


def _minds_its_neighbours(model: Any, length: int) -> bool:
    """Tell whether a model reads a row differently beside others, or piece by piece.

    As with rotary frequencies that depend on the longest row of a pass, beyond the length that the
    model was made for; or with windows that count columns without the cache's knowing (GPT-Neo).
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


def padded(
    rows: Prompts, pad: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return token ids and which of them are real, both (rows, longest)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    real = torch.zeros((len(rows), width), dtype=torch.bool)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), None) if left else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        real[row, place] = True
    return ids.to(device), real.to(device)


def finite(values: Tensor, rows: Sequence[int], model: Any) -> None:
    """Make sure that a model's numbers are numbers.

    Args:
        values: One for each row, (rows,), that is not finite if the row's logits are not.
        rows: The numbers of their prompts.
        model: The model.

    Raises:
        StarmergeError: One of the values is NaN or infinite.
    """
    broken = (~values.isfinite()).nonzero()
    if len(broken):
        name = model.config.name_or_path or type(model).__name__
        raise StarmergeError(
            f"The model {name} gives logits that are NaN or infinite (prompt "
            f"{rows[int(broken[0])]}). Its weights are broken, or too large for their dtype: look "
            "at them, or try dtype float32."
        )


def _beginning(prompts: Prompts) -> list[int]:
    """Return the tokens with which all prompts begin."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    pairs = zip(first, last, strict=False)
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def last_logits(model: Any, columns: int) -> dict[str, int]:
    """Return the argument that saves a model the logits of other columns, if it knows it."""
    return {"logits_to_keep": columns} if "logits_to_keep" in arguments_of(model) else {}


def arguments_of(model: Any) -> frozenset[str]:
    """Return the names of what a model can be called with, below adapters on it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(base.forward).parameters)


# ------------------------------------------------------------------------------------ Decoder only


class _CausalTexts(Texts):
    """Texts in the cache of a decoder.

    Args:
        model: The model.
        cache: Keys and values of all columns; None before there are any.
        real: Which columns are not padding, (rows, columns), booleans.
    """

    def __init__(self, model: Any, cache: Any, real: Tensor) -> None:
        self.model = model
        self.cache = cache
        self.real = real

    @classmethod
    def none(cls, model: Any) -> _CausalTexts:
        """Return one text in which nothing stands yet."""
        return cls(model, None, torch.zeros((1, 0), dtype=torch.bool, device=model.device))

    def chosen(self, rows: Sequence[int]) -> _CausalTexts:
        index = torch.tensor(rows, device=self.real.device)
        cache = None if self.cache is None else _chosen(self.cache, index)
        return _CausalTexts(self.model, cache, self.real[index])

    def joined(self, others: Sequence[_CausalTexts]) -> _CausalTexts:
        parts = [self, *others]
        cache = _joined([part.cache for part in parts], left=True)
        return _CausalTexts(
            self.model, cache, _stacked([part.real for part in parts], 1, left=True)
        )

    def read(self, tokens: Tensor, real: Tensor, *, last: bool = False) -> Tensor:
        positions = self.real.sum(-1, keepdim=True) + real.cumsum(-1) - 1
        self.real = torch.cat([self.real, real], dim=1)
        output = self.model(
            input_ids=tokens,
            attention_mask=self.real.long(),
            position_ids=positions.clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            **(last_logits(self.model, 1) if last else {}),
        )
        self.cache = getattr(output, "past_key_values", None)
        logits: Tensor = output.logits
        return logits[:, -1:] if last else logits


class _CausalReader(Reader):
    """Adds prompts to the text with which all of them begin.

    Args:
        model: The model.
        pad: Token id of padding.
        new: How many tokens will follow a prompt, at most.
        token_bytes: Memory of the keys and values of one token.
        beginning: That text, which may be empty.
    """

    def __init__(
        self, model: Any, pad: int, new: int, token_bytes: int, beginning: _CausalTexts
    ) -> None:
        super().__init__(model, pad, new, token_bytes)
        self.shared = beginning.real.shape[1]
        self._beginning = beginning

    def read(self, prompts: Prompts) -> tuple[Texts, Tensor]:
        texts = self._beginning.chosen([0] * len(prompts))
        rests = [prompt[self.shared :] for prompt in prompts]
        tokens, real = padded(rests, self.pad, self.model.device, left=True)
        return texts, texts.read(tokens, real, last=True)[:, -1]


# --------------------------------------------------------------------------------- Encoder-decoder


class _DecoderTexts(Texts):
    """What a decoder says of the prompts that its encoder has read.

    Args:
        model: The model.
        encoded: What the encoder made of the prompts, (rows, columns, hidden).
        real: Which columns of it are not padding, (rows, columns), booleans.
        cache: Keys and values of both attentions; None before the first token.
    """

    def __init__(self, model: Any, encoded: Tensor, real: Tensor, cache: Any = None) -> None:
        self.model = model
        self.encoded = encoded
        self.real = real
        self.cache = cache

    def chosen(self, rows: Sequence[int]) -> _DecoderTexts:
        index = torch.tensor(rows, device=self.real.device)
        own, cross = self._caches()
        cache = type(self.cache)(_chosen(own, index), _chosen(cross, index))
        return _DecoderTexts(self.model, self.encoded[index], self.real[index], cache)

    def joined(self, others: Sequence[_DecoderTexts]) -> _DecoderTexts:
        parts = [self, *others]
        own, cross = zip(*(part._caches() for part in parts), strict=True)
        return _DecoderTexts(
            self.model,
            _stacked([part.encoded for part in parts], 1, left=False),
            _stacked([part.real for part in parts], 1, left=False),
            type(self.cache)(_joined(own, left=False), _joined(cross, left=False)),
        )

    def read(self, tokens: Tensor, real: Tensor, *, last: bool = False) -> Tensor:
        output = self.model(
            encoder_outputs=(self.encoded,),
            attention_mask=self.real.long(),
            decoder_input_ids=tokens,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = getattr(output, "past_key_values", None)
        logits: Tensor = output.logits
        return logits[:, -1:] if last else logits

    def _caches(self) -> tuple[Any, Any]:
        return self.cache.self_attention_cache, self.cache.cross_attention_cache


class _EncoderReader(Reader):
    """Has the encoder read prompts, and the decoder its start token."""

    def read(self, prompts: Prompts) -> tuple[Texts, Tensor]:
        return _encode(self.model, prompts, self.pad)


def _encode(model: Any, prompts: Prompts, pad: int) -> tuple[_DecoderTexts, Tensor]:
    tokens, real = padded(prompts, pad, model.device)
    encoded = model.get_encoder()(input_ids=tokens, attention_mask=real.long())
    texts = _DecoderTexts(model, encoded.last_hidden_state, real)
    start = torch.full_like(tokens[:, :1], model.generation_config.decoder_start_token_id)
    return texts, texts.read(start, torch.ones_like(start, dtype=torch.bool))[:, -1]


# ------------------------------------------------------------------------------------------ Caches


def _keeps_keys_and_values(cache: Any) -> bool:
    """Tell whether a cache holds keys and values, column by column, and nothing else."""
    from transformers import cache_utils  # noqa: PLC0415

    kinds = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    return type(cache) is cache_utils.DynamicCache and all(
        type(layer) in kinds for layer in cache.layers
    )


def _bytes(cache: Any) -> int:
    """Return the memory of a cache."""
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


def _window(cache: Any) -> float:
    """Return the width of a cache's narrowest window; infinity if every layer sees everything."""
    return min(
        (layer.sliding_window for layer in cache.layers if layer.is_sliding), default=math.inf
    )


def _chosen(cache: Any, rows: Tensor) -> Any:
    """Return a cache with some rows of another."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)  # gives the layers new tensors
    return chosen


def _joined(caches: Sequence[Any], *, left: bool) -> Any:
    """Return a cache with the rows of several, the narrow ones padded on one side."""
    joined = copy.copy(caches[0])
    joined.layers = []
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        layer = copy.copy(parts[0])
        layer.keys = _stacked([part.keys for part in parts], 2, left=left)
        layer.values = _stacked([part.values for part in parts], 2, left=left)
        if layer.is_sliding:
            layer.cumulative_length = max(part.cumulative_length for part in parts)
        joined.layers.append(layer)
    return joined


def _stacked(parts: Sequence[Tensor], dim: int, *, left: bool) -> Tensor:
    """Return the rows of several tensors, zeros beside those that are narrower along ``dim``."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[dim] for part in parts)
    widened = []
    for part in parts:
        missing = width - part.shape[dim]
        sides = (missing, 0) if left else (0, missing)
        widened.append(extended(part, (0, 0) * (part.ndim - 1 - dim) + sides))
    return torch.cat(widened)
