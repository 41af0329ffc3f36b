"""Random language models of every kind of memory, small enough to be asked one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

VOCABULARY = 64
PAD = 0
ENDS = [1, *range(5, VOCABULARY, 7)]
"""Tokens that end a text: so many that some texts end at once and most end early."""
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
BART = {
    "d_model": 32,
    **{f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers",)},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
}
STARTS = {"pad_token_id": PAD, "eos_token_id": 1, "decoder_start_token_id": PAD}

KINDS: dict[str, Callable[[], Any]] = {
    # Rotary positions, grouped heads.
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS)),
    # Learned positions.
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)
    ),
    # A window that ends within most prompts, one that ends within none.
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, **HEADS, sliding_window=8)
    ),
    "mistral-wide": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, **HEADS, sliding_window=64)
    ),
    # A window that the cache does not know of.
    "gpt-neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=6,
        )
    ),
    # Layers with and without a window.
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SIZES, **HEADS, head_dim=8, sliding_window=8, tie_word_embeddings=False
        )
    ),
    # No positions that a caller could give.
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    ),
    # No keys and values.
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=8)),
    # Keys and values in some layers only.
    "jamba": lambda: transformers.JambaForCausalLM(
        transformers.JambaConfig(
            **SIZES,
            **HEADS,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
        )
    ),
    # An encoder with relative positions, one with learned ones.
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, **T5, **STARTS)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY,
            **BART,
            **STARTS,
            forced_eos_token_id=None,
            tie_word_embeddings=False,
        )
    ),
}


def make(kind: str) -> Any:
    """Return a random model in float32."""
    torch.manual_seed(0)
    return randomised(KINDS[kind]())


def randomised(model: Any) -> Any:
    """Give a model random matrices and the ends of these tests; return it.

    The matrices are of order one, as those of a trained model are in effect. With the small weights
    of a fresh one, a prompt hardly matters and all tokens are about equally likely.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "A_log" not in name:
                parameter.normal_(std=2 / parameter.shape[1] ** 0.5)
        if model.config.model_type == "t5":  # makes its logits smaller by this factor
            model.decoder.final_layer_norm.weight.fill_(model.config.d_model**0.5)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=ENDS, pad_token_id=PAD, decoder_start_token_id=PAD
    )
    return model.eval()


def tokenizer(**tokens: str) -> Any:
    """Return a tokenizer with a word for each id; by default it has tokens for padding and end."""
    words = ["<pad>", "</s>", *(f"w{number}" for number in range(2, VOCABULARY))]
    model = WordLevel({word: number for number, word in enumerate(words)}, unk_token="w2")
    tokens = tokens or {"pad_token": "<pad>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model),
        extra_special_tokens=[words[token] for token in (PAD, *ENDS)],
        **tokens,
    )


def prompts(count: int, *, shared: int = 5, longest: int = 14, seed: int = 2) -> list[list[int]]:
    """Return random prompts: ``shared`` tokens that all have, 1 to ``longest`` of their own."""
    generator = torch.Generator().manual_seed(seed)

    def some(length: int) -> list[int]:
        ids: list[int] = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        return ids

    beginning = some(shared)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [beginning + some(length) for length in lengths]
