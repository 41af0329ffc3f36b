"""Calls of the forward pass: they use no argument that transformers is about to remove."""

import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from starmerge_models.evaluation.models.forward import arguments_of, cache_name
from tests.evaluation.models.tiny_models import make

ASKING = """
import warnings
warnings.filterwarnings("error", message=".*(cache|past_key_values)", category=FutureWarning)
import sys
from starmerge_models.evaluation.models.generation import generate
from starmerge_models.evaluation.models.ranking import log_likelihoods
from tests.evaluation.models.tiny_models import make, prompts, tokenizer
for kind in sys.argv[1:]:
    model, rows = make(kind), prompts(4)
    texts = generate(model, tokenizer(), rows, max_new_tokens=4, is_final=lambda text: False,
                     batch_size=None, advance=lambda done: None)
    likelihoods = log_likelihoods(model, tokenizer(), rows, [[[3, 4, 1], [5, 1]]] * 4,
                                  batch_size=None, advance=lambda done: None)
    print(kind, len(texts), len(likelihoods))
"""


def test_no_run_uses_an_argument_that_transformers_removes() -> None:
    # In a process of its own, as libraries warn once. Their loggers warn too, on stderr.
    kinds = ["llama", "mistral", "gpt2", "t5", "bart", "mamba", "jamba"]
    run = subprocess.run(
        [sys.executable, "-c", ASKING, *kinds],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:-1] == [f"{kind} 4 4" for kind in kinds]
    assert "deprecated" not in run.stderr


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
