"""Log-likelihoods in batches, against a pass of its own over every whole text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.errors import StarmergeError
from starmerge_models.evaluation.models import batching, prefill, ranking
from starmerge_models.evaluation.models.loading import AdapterSwitch, load_model
from starmerge_models.evaluation.models.ranking import log_likelihoods
from starmerge_models_demo import ADAPTERS
from tests.evaluation.models import tiny_models
from tests.evaluation.models.tiny_models import KINDS, PAD, VOCABULARY, make, prompts

LARGEST = 64
ROUNDING = 5 * 3 * LARGEST * 2.0**-24
"""Largest error, in nats: of up to 5 tokens, a logit, a normaliser and their difference, none above
:data:`LARGEST`, are rounded to float32. The models themselves compute in float64."""

SINGLE = {"gemma2", "jamba"}
"""Kinds that the library cannot compute in float64 (a mask, a kernel). Their float32 adds an error
that is no larger: they are shallow."""

Likelihoods = list[list[float]]


def plain(model: Any, row: list[int], continuation: list[int]) -> float:
    """Return a log-likelihood from one pass over the prompt and all of its continuation."""
    ids = torch.tensor([row])
    rest = torch.tensor([continuation], dtype=torch.long)
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            decoder = torch.cat([torch.tensor([[PAD]]), rest], dim=1)[:, :-1]
            logits = model(input_ids=ids, decoder_input_ids=decoder).logits[0]
        else:
            logits = model(input_ids=torch.cat([ids, rest], dim=1)).logits[0, len(row) - 1 : -1]
    assert logits.abs().max() < LARGEST
    steps = logits.double().log_softmax(-1)
    return float(steps.gather(1, rest.T).sum())


def ours(
    model: Any, rows: list[list[int]], options: list[list[list[int]]], **settings: Any
) -> Likelihoods:
    """Call what is tested, with defaults."""
    defaults: dict[str, Any] = {"batch_size": None, "advance": lambda _: None}
    return log_likelihoods(model, tiny_models.tokenizer(), rows, options, **(defaults | settings))


def continuations(rows: int) -> list[list[list[int]]]:
    """Return a few continuations for each row, of 1 to 5 tokens, some of which begin alike."""
    generator = random.Random(0)

    def some(length: int) -> list[int]:
        return [generator.randrange(VOCABULARY) for _ in range(length)]

    found = []
    for _ in range(rows):
        stem = some(generator.randrange(4))
        own = [[*stem, *some(generator.randint(1, 2))] for _ in range(generator.randint(1, 4))]
        found.append([*own, some(1), [*own[0], *some(1)]])
    return found


def assert_close(found: Likelihoods, expected: Likelihoods) -> None:
    """Make sure that two results are the same but for rounding."""
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_those_of_whole_texts(kind: str) -> None:
    model, rows = make(kind), prompts(16)
    if kind not in SINGLE:
        model = model.double()
    options = continuations(len(rows))
    expected = [
        [plain(model, row, tokens) for tokens in own]
        for row, own in zip(rows, options, strict=True)
    ]
    assert_close(ours(model, rows, options), expected)
    assert_close(ours(model, rows, options, batch_size=3), expected)
    order = random.Random(1).sample(range(len(rows)), len(rows))
    shuffled = ours(model, [rows[n] for n in order], [options[n] for n in order])
    assert_close(shuffled, [expected[n] for n in order])


@pytest.mark.parametrize("kind", ["llama", "t5", "mamba"])
def test_batches_that_fill_the_memory_change_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, rows = make(kind), prompts(16)
    options = continuations(len(rows))
    expected = ours(model, rows, options)
    monkeypatch.setattr(prefill, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(prefill, "PASS_TOKENS", 20)
    monkeypatch.setattr(batching, "PASS_TOKENS", 20)
    monkeypatch.setattr(ranking, "PASS_TOKENS", 20)
    monkeypatch.setattr(ranking, "PASS_LOGITS", 5 * VOCABULARY)
    done: list[int] = []
    assert_close(ours(model, rows, options, advance=done.append), expected)
    assert sum(done) == len(rows)
    assert len(done) > 4


@pytest.mark.parametrize("kind", ["llama", "t5", "mamba"])
def test_one_token_is_read_off_the_prompt(kind: str) -> None:
    model, rows = make(kind), prompts(4)
    all_of_them = [[[token] for token in range(VOCABULARY)] for _ in rows]
    for likelihoods in ours(model, rows, all_of_them):
        assert sum(torch.tensor(likelihoods).double().exp()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5", "mamba"])
def test_nothing_follows_for_sure_and_no_continuations_have_no_likelihoods(kind: str) -> None:
    model, rows = make(kind), prompts(3)
    found = ours(model, rows, [[[], [3], [3, 4]], [], [[]]])
    assert found[0][0] == 0
    assert found[0][1] > found[0][2]
    assert found[1:] == [[], [0.0]]
    assert ours(model, [], []) == []


_texts = st.lists(st.lists(st.integers(0, 2), max_size=4).map(tuple), max_size=8)


@given(_texts)
def test_stems_serve_every_continuation_and_none_begins_another(texts: list[Any]) -> None:
    stems = ranking._stems(texts)
    assert sorted(number for served in stems.values() for number in served) == [*range(len(texts))]
    for stem, served in stems.items():
        assert all(
            texts[number][:-1] == stem[: max(0, len(texts[number]) - 1)] for number in served
        )
        assert not any(other != stem and other[: len(stem)] == stem for other in stems)


@pytest.mark.parametrize("kind", ["llama", "t5", "mamba"])
def test_a_model_without_numbers_is_refused(kind: str) -> None:
    model = make(kind)
    model.config.name_or_path = "models/broken"
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("inf")
    with pytest.raises(
        StarmergeError, match=r"models/broken gives logits that are NaN or infinite"
    ):
        ours(model, prompts(3), continuations(3))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(StarmergeError, match="Prompt 1 has no tokens"):
        ours(make("llama"), [[3], []], continuations(2))


def test_the_real_model_finds_likely_what_it_finds_likely_alone(smollm2: Path) -> None:
    model, tokenizer = load_model(smollm2, dtype="float32")
    rows: list[list[int]] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Write this number in digits.\n{word}"}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for word in ("seven", "four hundred and twelve")
    ]
    words = [["7", "8"], ["412", "42", "413"]]
    options = [
        [[*tokenizer(word)["input_ids"], tokenizer.eos_token_id] for word in own] for own in words
    ]
    switch = AdapterSwitch(model, {"digits": ADAPTERS / "digits"})
    for name, some in (("digits", 2), (None, 1)):
        with switch.active(name) as active:
            found = ours(active, rows[:some], options[:some])
            for row, own, likelihoods in zip(rows[:some], options[:some], found, strict=True):
                for tokens, likelihood in zip(own, likelihoods, strict=True):
                    # 30 layers, logits of up to 40.
                    assert likelihood == pytest.approx(plain(active, row, tokens), abs=1e-3)
        if name:
            assert [max(own) for own in found] == [own[0] for own in found]
