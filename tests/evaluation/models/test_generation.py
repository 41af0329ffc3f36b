"""Greedy decoding in batches, against ``model.generate`` of one prompt at a time."""

from __future__ import annotations

import random
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from starmerge_models.errors import StarmergeError
from starmerge_models.evaluation.models import batching, prefill
from starmerge_models.evaluation.models.generation import generate
from starmerge_models.evaluation.models.loading import AdapterSwitch, load_model
from starmerge_models_demo import ADAPTERS
from tests.evaluation.models import tiny_models
from tests.evaluation.models.tiny_models import ENDS, KINDS, make, prompts

NEW = 8

CLEAR = 1e-3
"""Least distance of the two largest logits, at every step, of prompts that are compared. Rounding
in float32 moves log-likelihoods of these models by less than a tenth of it (test_ranking.py)."""


def plain(
    model: Any, tokenizer: Any, rows: list[list[int]], new: int = NEW
) -> tuple[list[list[int]], list[str]]:
    """Return prompts without a near tie, and what the library writes for each of them alone."""
    kept, texts = [], []
    for row in rows:
        output = model.generate(
            input_ids=torch.tensor([row]),
            attention_mask=torch.ones((1, len(row)), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new,
            output_scores=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.scores).topk(2).values
        if (best[:, 0] - best[:, 1]).min() > CLEAR:
            written = output.sequences[0, -len(output.scores) :]
            kept.append(row)
            texts.append(tokenizer.decode(written, skip_special_tokens=True))
    assert len(kept) > 0.8 * len(rows)
    return kept, texts


def ours(model: Any, tokenizer: Any, rows: list[list[int]], **options: Any) -> list[str]:
    """Call what is tested, with defaults."""
    defaults: dict[str, Any] = {
        "max_new_tokens": NEW,
        "is_final": lambda _: False,
        "batch_size": None,
        "advance": lambda _: None,
    }
    return generate(model, tokenizer, rows, **(defaults | options))


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_gets_what_it_gets_alone(kind: str) -> None:
    model, tokenizer = make(kind), tiny_models.tokenizer()
    rows, expected = plain(model, tokenizer, prompts(20))
    assert ours(model, tokenizer, rows) == expected
    assert ours(model, tokenizer, rows, batch_size=3) == expected
    order = random.Random(0).sample(range(len(rows)), len(rows))
    assert ours(model, tokenizer, [rows[row] for row in order]) == [expected[row] for row in order]
    assert len({len(text.split()) for text in expected}) >= 3


@pytest.mark.parametrize("kind", ["llama", "t5", "mamba"])
def test_a_text_is_cut_where_it_is_final(kind: str) -> None:
    model, tokenizer = make(kind), tiny_models.tokenizer()
    rows, whole = plain(model, tokenizer, prompts(20))
    seen: list[str] = []

    def is_final(text: str) -> bool:
        seen.append(text)
        return len(text.split()) >= 2 or text == "w20"

    texts = ours(model, tokenizer, rows, is_final=is_final)
    for text, all_of_it in zip(texts, whole, strict=True):
        words = all_of_it.split()
        cut = next((n for n in range(1, len(words)) if is_final(" ".join(words[:n]))), len(words))
        assert text == " ".join(words[:cut])
    assert set(texts) - {""} <= set(seen)
    assert texts != whole


@pytest.mark.parametrize("shared", [0, 1, 9])
def test_any_beginning_may_be_shared(shared: int) -> None:
    model, tokenizer = make("llama"), tiny_models.tokenizer()
    rows, expected = plain(model, tokenizer, prompts(12, shared=shared, longest=4))
    assert ours(model, tokenizer, rows) == expected


def test_a_prompt_may_be_the_beginning_of_all_others_or_all_of_them() -> None:
    model, tokenizer = make("llama"), tiny_models.tokenizer()
    row = prompts(1, shared=9)[0]
    rows, expected = plain(model, tokenizer, [row, row[:6], row[:9], row, row[:1], row])
    assert ours(model, tokenizer, rows) == expected
    assert ours(model, tokenizer, rows[:1] * 3) == expected[:1] * 3


@pytest.mark.parametrize("kind", ["llama", "t5", "mamba"])
def test_batches_that_fill_the_memory_change_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, tokenizer = make(kind), tiny_models.tokenizer()
    rows, expected = plain(model, tokenizer, prompts(20))
    monkeypatch.setattr(prefill, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(prefill, "PASS_TOKENS", 20)
    monkeypatch.setattr(batching, "PASS_TOKENS", 20)
    sizes: list[int] = []
    assert ours(model, tokenizer, rows, advance=sizes.append) == expected
    assert sum(sizes) == len(rows)


@pytest.mark.parametrize("kind", ["llama", "t5", "mamba"])
def test_all_prompts_are_reported(kind: str) -> None:
    done: list[int] = []
    ours(make(kind), tiny_models.tokenizer(), prompts(30), batch_size=7, advance=done.append)
    assert sum(done) == 30
    assert len(done) > 4


def test_a_tokenizer_needs_no_token_for_padding() -> None:
    model, tokenizer = make("llama"), tiny_models.tokenizer()
    bare = tiny_models.tokenizer(bos_token="w5")
    assert bare.pad_token_id is None
    assert bare.eos_token_id is None
    rows = prompts(10)
    assert ours(model, bare, rows) == ours(model, tokenizer, rows)


@pytest.mark.parametrize("kind", ["llama", "t5", "mamba"])
def test_a_text_may_end_at_once_and_its_end_is_no_part_of_it(kind: str) -> None:
    model, tokenizer, rows = make(kind), tiny_models.tokenizer(), prompts(10)
    written = ours(model, tokenizer, rows)
    word = next(text.split()[0] for text in written if text)
    model.generation_config.eos_token_id = [*ENDS, int(word[1:])]
    expected = [" ".join(takewhile(word.__ne__, text.split())) for text in written]
    assert ours(model, tokenizer, rows) == expected
    assert "" in expected


def test_nothing_is_final_in_the_middle_of_a_character() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**tiny_models.SIZES | {"vocab_size": 256}, **tiny_models.HEADS)
    model = tiny_models.randomised(LlamaForCausalLM(config))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    seen: list[str] = []
    texts = ours(model, tokenizer, prompts(20), is_final=lambda text: bool(seen.append(text)))
    assert any(text.endswith("\ufffd") for text in texts)
    assert seen
    assert not any(text.endswith("\ufffd") for text in seen)


@pytest.mark.parametrize("kind", ["llama", "t5", "mamba"])
def test_a_model_without_numbers_is_refused(kind: str) -> None:
    model = make(kind)
    model.config.name_or_path = "models/broken"
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[7] = float("nan")
    with pytest.raises(
        StarmergeError, match=r"models/broken gives logits that are NaN .*prompt \d"
    ):
        ours(model, tiny_models.tokenizer(), prompts(5))


def test_an_empty_prompt_is_refused_and_no_prompt_is_no_response() -> None:
    model, tokenizer = make("llama"), tiny_models.tokenizer()
    with pytest.raises(StarmergeError, match="Prompt 1 has no tokens"):
        ours(model, tokenizer, [[3], []])
    assert ours(model, tokenizer, []) == []


def test_an_adapter_on_an_encoder_decoder_writes_what_it_writes_alone() -> None:
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], init_lora_weights=False
    )
    base, tokenizer = make("t5"), tiny_models.tokenizer()
    before = ours(base, tokenizer, prompts(20))
    model = get_peft_model(base, config)
    rows, expected = plain(model, tokenizer, prompts(20))
    assert ours(model, tokenizer, rows) == expected
    assert before != ours(model, tokenizer, prompts(20))


def test_the_real_model_writes_what_it_writes_alone(smollm2: Path) -> None:
    model, tokenizer = load_model(smollm2, dtype="float32")
    words = ("seven", "ninety thousand and six")
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Write this number in digits.\n{word}"}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for word in words
    ]
    switch = AdapterSwitch(model, {"digits": ADAPTERS / "digits"})
    for name, some in (("digits", rows), (None, rows[:1])):
        with switch.active(name) as active:
            kept, expected = plain(active, tokenizer, some)
            assert ours(active, tokenizer, kept) == expected
            if name:
                assert expected == ["7", "90006"]
