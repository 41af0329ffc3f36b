from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.models.generation import generate
from starmerge_models.evaluation.models.ranking import log_likelihoods
from starmerge_models.evaluation.models.vllm import (
    load_vllm,
    log_likelihood,
    required_lora_rank,
    text_of,
)
from tests.conftest import MakeAdapter, edit_json


class Logprob(NamedTuple):
    """What vLLM says of a token."""

    logprob: float


def test_without_a_gpu_it_says_so(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="needs a GPU"):
        load_vllm(tiny_base, {})


def test_without_the_package_its_extra_is_named(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"pip install 'starmerge-models\[vllm\]'"):
        load_vllm(tiny_base, {})


def test_room_is_made_for_the_greatest_rank(make_adapter: MakeAdapter) -> None:
    small = make_adapter("small", r=4)
    middle = make_adapter("middle", r=9)
    mixed = make_adapter("mixed", r=4, rank_pattern={"q_proj": 20})
    assert required_lora_rank({"small": small}) == 8
    assert required_lora_rank({"small": small, "middle": middle}) == 16
    assert required_lora_rank({"mixed": mixed, "middle": middle}) == 32


def test_a_rank_that_vllm_does_not_take_is_an_error(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter("great")
    edit_json(adapter / "adapter_config.json", r=513)
    with pytest.raises(UsageError, match="great has rank 513, and vLLM takes 512 at most"):
        required_lora_rank({"great": adapter})


def test_log_likelihoods_are_cut_out_of_those_of_the_whole_text(
    tiny_base: Path, smollm2: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)  # only its token for padding is asked for
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    prompt, options = [5, 17, 3], [[8], [9, 40, 2], []]
    found = []
    for tokens in options:
        text = [*prompt, *tokens]
        with torch.inference_mode():
            scores = model(torch.tensor([text])).logits[0].log_softmax(-1)
        # As vLLM gives them: of the likeliest token, and of the one that is there.
        steps: list[dict[int, Logprob] | None] = [None]
        for token, row in zip(text[1:], scores, strict=False):
            steps.append({int(i): Logprob(float(row[i])) for i in (row.argmax(), token)})
        found.append(log_likelihood(steps, len(prompt), tokens))
    (expected,) = log_likelihoods(
        model, tokenizer, [prompt], [options], batch_size=None, advance=lambda _: None
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[2] == 0
    assert all(math.isfinite(value) and value < 0 for value in found[:2])


@pytest.fixture(scope="module")
def written(smollm2: Path) -> tuple[Any, Any, list[int], list[int]]:
    """Return the real model, its tokenizer, a prompt, and the tokens that the library adds.

    What it adds is `` ö ö ö``, in tokens of half a letter each.
    """
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("ä ö ü Ä Ö")["input_ids"]
    whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)
    return model, tokenizer, prompt, whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("final", ["", "ö ö", "never"])
def test_a_text_ends_where_the_other_backend_ends_it(
    final: str, written: tuple[Any, Any, list[int], list[int]]
) -> None:
    model, tokenizer, prompt, tokens = written

    def is_final(text: str) -> bool:
        return final in text

    options: dict[str, Any] = {"batch_size": None, "advance": lambda _: None}
    (expected,) = generate(
        model, tokenizer, [prompt], max_new_tokens=len(tokens), is_final=is_final, **options
    )
    assert text_of(tokenizer, tokens, is_final) == expected
    assert expected.count("ö") == {"": 1, "ö ö": 2, "never": 3}[final]
