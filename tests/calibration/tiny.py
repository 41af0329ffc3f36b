"""Random models of text of every kind, small enough to be read by hand, and their tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from tests.evaluation.models.tiny_models import (
    BART,
    HEADS,
    KINDS,
    SIZES,
    T5,
    VOCABULARY,
    randomised,
)

_SPECIAL = ["<pad>", "</s>", "<s>", "<mask>", "<unk>"]
START = 0
"""The token that decoders begin with."""

_BERT = transformers.BertConfig(
    **SIZES, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64
)

MODELS: dict[str, Callable[[], Any]] = {
    "llama": KINDS["llama"],
    "gpt2": KINDS["gpt2"],
    "untied gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, tie_word_embeddings=False
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            **T5,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=START,
        )
    ),
    "bare t5": lambda: transformers.T5Model(transformers.T5Config(vocab_size=VOCABULARY, **T5)),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY,
            **BART,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=START,
            tie_word_embeddings=False,
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(_BERT),
    "bert classifier": lambda: transformers.BertForSequenceClassification(_BERT),
    "longformer bert": lambda: transformers.LongformerForMaskedLM(
        transformers.LongformerConfig(
            **SIZES,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            attention_window=[4, 4],
        )
    ),
    "albert": lambda: transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(
            vocab_size=VOCABULARY,
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, **HEADS, num_local_experts=2)
    ),
    "mamba": KINDS["mamba"],
}


def store(kind: str, folder: Path, *, chat: str | None = None) -> Path:
    """Write a random model and its tokenizer; return the folder."""
    torch.manual_seed(0)
    model = randomised(MODELS[kind]())
    model.generation_config = None if "bert" in kind else model.generation_config
    if model.generation_config is not None:
        model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer(masked="bert" in kind, chat=chat).save_pretrained(folder)
    return folder


def tokenizer(*, masked: bool = False, chat: str | None = None) -> Any:
    """Return a tokenizer of words "w5", "w6", …; that of encoders puts <s> and </s> around."""
    words = [*_SPECIAL, *(f"w{number}" for number in range(len(_SPECIAL), VOCABULARY))]
    inner = Tokenizer(WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    if masked:
        inner.post_processor = TemplateProcessing(
            "<s> $A </s>", "<s> $A $B </s>", [("<s>", 2), ("</s>", 1)]
        )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    if masked:
        names["mask_token"] = "<mask>"
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    made.chat_template = chat
    return made


def texts(lengths: list[int], seed: int = 3) -> list[str]:
    """Return random texts of some numbers of words."""
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(
            f"w{number}"
            for number in torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        )
        for length in lengths
    ]
