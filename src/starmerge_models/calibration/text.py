"""Generates and tokenises calibration text.

How a model generates text depends on its kind. A causal model samples at temperature 1 after the
beginning of its chat template, before a user's message (after Magpie, arXiv 2406.08464), or after
its BOS token. An encoder-decoder model first generates texts with an empty encoder input; the
encoder then reads these texts, and the decoder reads its own answers to them. An encoder fills
masks, a tenth of them at a time in random order, by sampling (after mask-predict, arXiv
1904.09324).

Each random number belongs to a sequence and a position in it, so the text does not depend on the
batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.models.forward import check_finite
from starmerge_models.evaluation.models.loading import context_length
from starmerge_models.evaluation.models.prompts import Prompter
from starmerge_models.evaluation.tasks.sources import read_file
from starmerge_models.evaluation.tasks.task import Example, Task

READ_BATCH_TOKENS = 2048
"""Most tokens of a batch for reading, unless one sequence has more."""

GENERATE_BATCH_TOKENS = 8192
"""Most tokens of a batch for generation, each with keys and values in memory."""

_ROUNDS = 10
"""Passes in which an encoder fills all masks of a sequence."""

Advance = Callable[[int], None]
"""A callback that gets the number of units that were just completed."""

Kind = Literal["causal", "encoder-decoder", "masked", "other"]
"""How a text model generates; "other": it cannot."""


@dataclass(frozen=True)
class Reading:
    """One sequence of a forward pass."""

    ids: tuple[int, ...]
    """Token ids; for an encoder-decoder model, the encoder's."""
    decoder: tuple[int, ...] = ()
    """Token ids of the decoder, if there is one."""


class TextGenerator:
    """Makes readings from generated text, given texts and prompts.

    Args:
        model: The model, as :func:`starmerge_models.evaluation.models.loading.load_text_model`
            loads it.
        tokenizer: Its tokenizer.
        seed: Seed of the generated text.
        length: Number of generated tokens of a sequence.
    """

    def __init__(self, model: Any, tokenizer: Any, *, seed: int, length: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._seed, self.length = seed, length
        self.kind = kind_of(model, tokenizer)
        self.context = context_length(model, tokenizer)
        # An encoder of any kind gets a prompt without a trailing line break.
        self._prompter = Prompter(tokenizer, self.context, self.kind != "causal")

    def beginning(self) -> list[int]:
        """Return the token ids at the beginning of a generated sequence.

        Raises:
            UsageError: The model cannot generate text, there is no token to begin with, or the
                context is too short.
        """
        if self.kind == "other":
            raise UsageError(
                f"{self._name} writes no text ({type(self._model).__name__} has no head that "
                "predicts tokens). Give it texts to read: --texts FILE."
            )
        if self.kind == "causal":
            tokenizer = self._tokenizer
            begins = (tokenizer.bos_token_id, tokenizer.eos_token_id)
            ids = self._prompter.beginning() or [id for id in begins if id is not None][:1]
            if not ids:
                raise UsageError(
                    f"{self._name} has neither a chat template nor a token that begins a text, so "
                    "it cannot write by itself. Give it texts to read: --texts FILE."
                )
        elif self.kind == "masked":
            ids = self._masked(0)
        else:
            ids = self._encoded("")
        if self.context is not None and len(ids) + self.length > self.context:
            raise UsageError(
                f"{self._name} takes {self.context} tokens: {len(ids)} at the beginning and "
                f"{self.length} more are too many. Lower --length."
            )
        return ids

    def probe(self) -> Reading:
        """Return a few tokens for finding the groups of modules."""
        ids = tuple(self._encoded("a, b and c")) or (0, 1, 2, 3)
        if self.kind != "encoder-decoder":
            return Reading(ids)
        return Reading(ids, (self._model.generation_config.decoder_start_token_id,))

    def own(self, sequences: int, advance: Advance) -> list[Reading]:
        """Return sequences that the model generates.

        Args:
            sequences: Number of sequences.
            advance: Called with the number of sequences and answers that were just completed.

        Raises:
            UsageError: As :meth:`beginning`.
            StarmergeError: The model computes logits that are not finite.
        """
        beginning = self.beginning()
        if self.kind == "masked":
            return self._filled(sequences, advance)
        begun = [Reading(tuple(beginning))] * sequences
        if self.kind == "causal":
            written = self._written([reading.ids for reading in begun], advance, stream=0)
            return [
                Reading((*reading.ids, *new)) for reading, new in zip(begun, written, strict=True)
            ]
        first = self._written([reading.ids for reading in begun], advance, stream=0)
        texts = self._tokenizer.batch_decode(first, skip_special_tokens=True)
        read = [Reading(tuple(self._encoded(text, self.length))) for text in texts]
        return self.answered(read, advance)

    def answered(self, readings: Sequence[Reading], advance: Advance) -> list[Reading]:
        """Return readings with the decoder's answers to the encoder's tokens, up to the end token.

        For a model without a decoder the readings are returned unchanged.

        Args:
            readings: The encoder's tokens.
            advance: Called with the number of readings that were just completed.

        Raises:
            StarmergeError: The model computes logits that are not finite.
        """
        if self.kind != "encoder-decoder":
            advance(len(readings))
            return list(readings)
        start = self._model.generation_config.decoder_start_token_id
        ends = self._model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        written = self._written([reading.ids for reading in readings], advance, stream=1)
        answers = []
        for reading, new in zip(readings, written, strict=True):
            end = next((place for place, id in enumerate(new) if id in ends), len(new) - 1)
            # The last generated token is not an input.
            answers.append(Reading(reading.ids, (start, *new[:end])))
        return answers

    def texts(self, texts: Sequence[str], longest: int | None) -> list[Reading]:
        """Return the readings of texts, with the tokenizer's special tokens.

        Args:
            texts: The texts.
            longest: Most tokens of each text; longer texts are truncated, also to the model's
                context.

        Raises:
            UsageError: A text has no tokens.
        """
        readings = [Reading(tuple(self._encoded(text, longest))) for text in texts]
        for number, reading in enumerate(readings, start=1):
            if not reading.ids:
                raise UsageError(f"Text {number} has no tokens. Leave it out.")
        return readings

    def prompts(self, task: Task, rows: Sequence[Example]) -> list[Reading]:
        """Return the readings of a task's rows, with the prompts of an evaluation.

        Raises:
            UsageError: A prompt does not fit the model, or has no tokens.
        """
        readings = [Reading(self._prompter.prompt(task, row).ids) for row in rows]
        for row, reading in zip(rows, readings, strict=True):
            if not reading.ids:
                raise UsageError(f"Task {task.name}, row {row.id}: the prompt has no tokens.")
        return readings

    @property
    def _name(self) -> str:
        return str(self._model.config.name_or_path or type(self._model).__name__)

    def _encoded(self, text: str, longest: int | None = None) -> list[int]:
        limit = min((n for n in (longest, self.context) if n is not None), default=None)
        if limit is None:
            ids: list[int] = self._tokenizer(text)["input_ids"]
        else:
            ids = self._tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        if not ids and self.kind == "encoder-decoder" and self._tokenizer.eos_token_id is not None:
            return [self._tokenizer.eos_token_id]  # an encoder must read something
        return ids

    def _masked(self, count: int) -> list[int]:
        """Return a sequence of masks, with the tokenizer's special tokens."""
        ids: list[int] = self._tokenizer(self._tokenizer.mask_token)["input_ids"]
        place = ids.index(self._tokenizer.mask_token_id)
        return [*ids[:place], *ids[place : place + 1] * count, *ids[place + 1 :]]

    def _uniform(self, sequences: int, stream: int) -> Tensor:
        """Return a random number for each token, (sequences, length), float64, on the device.

        Args:
            sequences: Number of sequences.
            stream: Index of an independent stream of random numbers.
        """
        generator = torch.Generator().manual_seed(self._seed)
        shape = (stream + 1, sequences, self.length)
        numbers = torch.rand(shape, generator=generator, dtype=torch.float64)[stream]
        return numbers.to(self._model.device)

    @torch.inference_mode()
    def _written(
        self, prompts: Sequence[Sequence[int]], advance: Advance, *, stream: int
    ) -> list[list[int]]:
        """Return the model's continuations of prompts, ``length`` tokens each.

        Generation does not stop at an end token.
        """
        numbers = self._uniform(len(prompts), stream)
        written: list[list[int]] = [[] for _ in prompts]
        for rows in batches(
            [(len(prompt), self.length) for prompt in prompts], GENERATE_BATCH_TOKENS
        ):
            ids = torch.tensor([prompts[row] for row in rows], device=self._model.device)
            draw = _TokenSampler(numbers[rows], rows, self._model)
            options = self._model.generation_config
            ends, options.eos_token_id = options.eos_token_id, None
            try:
                self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=self.length,
                    pad_token_id=0,
                    logits_processor=[draw],
                )
            finally:
                options.eos_token_id = ends
            for place, row in enumerate(rows):
                written[row] = [int(tokens[place]) for tokens in draw.tokens]
            advance(len(rows))
        return written

    @torch.inference_mode()
    def _filled(self, sequences: int, advance: Advance) -> list[Reading]:
        """Return sequences with masks filled by the model, a tenth of them at a time."""
        tokenizer, model = self._tokenizer, self._model
        mask = tokenizer.mask_token_id
        start = torch.tensor(self._masked(self.length), device=model.device)
        places = (start == mask).nonzero()[:, 0]
        orders, numbers = self._uniform(sequences, 0).argsort(-1), self._uniform(sequences, 1)
        special = torch.tensor(tokenizer.all_special_ids, device=model.device)
        readings = []
        for rows in batches([(len(start),)] * sequences, READ_BATCH_TOKENS):
            ids = start.expand(len(rows), -1).clone()
            for chosen in orders[rows].tensor_split(_ROUNDS, dim=-1):
                if not chosen.numel():
                    continue
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                picked = places[chosen]
                scores = logits.gather(1, picked[..., None].expand(-1, -1, logits.shape[-1]))
                scores[..., special] = -torch.inf
                check_finite(scores.max(-1).values.amax(-1), rows, model)
                ids.scatter_(1, picked, sample_tokens(scores, numbers[rows].gather(1, chosen)))
            readings += [Reading(tuple(row)) for row in ids.tolist()]
            advance(len(rows))
        return readings


class _TokenSampler:
    """Samples the next token of each row, as a logits processor for ``generate``.

    Args:
        numbers: A random number for each row and step, (rows, steps), float64.
        rows: Indices of the rows, for errors.
        model: The model, for errors.
    """

    def __init__(self, numbers: Tensor, rows: Sequence[int], model: Any) -> None:
        self._numbers, self._rows, self._model = numbers, rows, model
        self.tokens: list[Tensor] = []
        """The tokens so far, step by step, (rows,) each."""

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        check_finite(scores.max(-1).values, self._rows, self._model)
        chosen = sample_tokens(scores, self._numbers[:, len(self.tokens)])
        self.tokens.append(chosen)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def sample_tokens(logits: Tensor, numbers: Tensor) -> Tensor:
    """Sample tokens from the distributions softmax(logits), by inversion.

    Args:
        logits: (…, vocabulary).
        numbers: Uniform in [0, 1), (…), float64.
    """
    sums = logits.double().softmax(-1).cumsum(-1)
    target = numbers[..., None] * sums[..., -1:]
    found = torch.searchsorted(sums, target, right=True)[..., 0]
    return found.clamp_(max=logits.shape[-1] - 1)


def batches(lengths: Sequence[tuple[int, ...]], tokens: int) -> list[list[int]]:
    """Return batches of the indices of sequences of equal length.

    Equal lengths need no padding, which would have to be excluded from every sum and would change
    the results of some models.

    Args:
        lengths: Of each sequence, the tokens of the encoder and the decoder, or of the only one.
        tokens: Most tokens of a batch, unless one sequence has more.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, length in enumerate(lengths):
        alike.setdefault(length, []).append(number)
    return [
        rows[start : start + size]
        for length, rows in alike.items()
        for size in [max(1, tokens // sum(length))]
        for start in range(0, len(rows), size)
    ]


def kind_of(model: Any, tokenizer: Any) -> Kind:
    """Return how a model generates text."""
    from transformers.models.auto import modeling_auto  # noqa: PLC0415  (slow to import)

    if model.can_generate():
        return "encoder-decoder" if model.config.is_encoder_decoder else "causal"
    fills = type(model).__name__ in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return "masked" if fills and tokenizer.mask_token_id is not None else "other"


def texts_of(file: Path) -> list[str]:
    """Read the non-empty texts of a file: .txt, one text per line, or .jsonl with ``text``.

    Raises:
        UsageError: The file is missing, of another kind, broken, or has no text.
    """
    if file.suffix.lower() not in (".txt", ".jsonl"):
        raise UsageError(f"{file} is neither .txt (one text per line) nor .jsonl (with 'text').")
    if not file.is_file():
        raise UsageError(f"{file} does not exist.")
    if file.suffix.lower() == ".jsonl":
        texts = []
        for number, row in enumerate(read_file(file), start=1):
            if not isinstance(row.get("text"), str):
                raise UsageError(f"{file}, row {number}: there is no text under 'text'.")
            texts.append(row["text"])
    else:
        try:
            texts = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8: {error}. Save it as UTF-8.") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(f"{file} has no text.")
    return texts
