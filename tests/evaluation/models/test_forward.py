"""Calls of the forward pass: they use no argument that transformers is about to remove."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

from starmerge_models.evaluation.models.forward import arguments_of, cache_name
from starmerge_models.evaluation.models.generation import generate
from starmerge_models.evaluation.models.ranking import log_likelihoods
from tests.evaluation.models.tiny_models import make, prompts, tokenizer


@pytest.mark.filterwarnings("error:.*(cache|past_key_values):FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "t5", "bart", "mamba", "jamba"])
def test_no_run_uses_an_argument_that_transformers_removes(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.warning_once.cache_clear()  # what was said once is said again
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    model, rows = make(kind), prompts(4)
    settings = {"batch_size": None, "advance": lambda _: None}
    texts = generate(
        model, tokenizer(), rows, max_new_tokens=4, is_final=lambda _: False, **settings
    )
    likelihoods = log_likelihoods(model, tokenizer(), rows, [[[3, 4, 1], [5, 1]]] * 4, **settings)
    logger.removeHandler(caplog.handler)
    assert len(texts) == len(likelihoods) == 4
    assert "deprecated" not in caplog.text


@pytest.mark.parametrize("kind", ["llama", "t5", "gemma2"])
def test_the_cache_has_the_name_of_the_forward_and_of_its_output(kind: str) -> None:
    model = make(kind)
    name = cache_name(model)
    assert name in arguments_of(model)
    tokens = {"input_ids": model.dummy_inputs["input_ids"] % 64}
    if model.config.is_encoder_decoder:
        tokens["decoder_input_ids"] = tokens["input_ids"]
    assert getattr(model(**tokens, use_cache=True), str(name)) is not None


def test_an_adapter_hides_no_argument() -> None:
    model = make("llama")
    expected = arguments_of(model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert arguments_of(adapted) == expected
    assert cache_name(adapted) == cache_name(model)
