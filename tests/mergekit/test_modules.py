"""Parts of models in mergekit's recipes: encoders and decoders, each merged in its own way."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from starmerge_models.errors import UsageError
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.plan import make_plan
from starmerge_models.recipe_file import load_recipe


@pytest.fixture
def models(tmp_path):
    """A tiny T5 and two fine-tunes, by name: their weights in float64."""
    config = T5Config(
        vocab_size=96, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    found = {}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
        torch.manual_seed(seed)
        for weight in model.parameters() if seed else ():
            weight.data += 0.01 * torch.randn_like(weight)
        model.save_pretrained(tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        found[name] = {key: weight.double().numpy() for key, weight in weights.items()}
    return found


def merged(recipe, folder):
    """The folder that a recipe makes, and its weights."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = run(make_plan(load_recipe(folder / "recipe.yaml"), folder / "out"), Threads())
    weights = load_file(result.path / "model.safetensors")
    return result.path, {name: weight.double().numpy() for name, weight in weights.items()}


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def weighted(**weights):
    return [{"model": name, "parameters": {"weight": w}} for name, w in weights.items()]


def test_each_module_has_models_and_parameters_of_its_own(models, tmp_path):
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "modules": {
            "encoder": {"models": weighted(a=0.5), "parameters": {"lambda": 0.4}},
            "decoder": {"models": weighted(a=0.3, b=[0, 1])},
        },
        "parameters": {"lambda": 2},
    }
    path, found = merged(recipe, tmp_path)
    base, a, b = models["base"], models["a"], models["b"]
    for name, weight in found.items():
        start, one, two = base[name], a[name] - base[name], b[name] - base[name]
        if name.startswith("encoder"):
            expected = start + 0.4 * 0.5 * one
        elif name.startswith("decoder"):
            of_b = 1 if name.startswith("decoder.block.1") else 0
            expected = start + 2 * (0.3 * one + of_b * two)
        else:  # mergekit leaves out what no module names
            expected = start
        close(weight, expected)
    assert AutoModelForSeq2SeqLM.from_pretrained(path)


def test_each_module_has_slices_of_its_own(models, tmp_path):
    def slice_(first, last, *names, weight=1.0):
        sources = [
            {"model": name, "layer_range": [first, last]}
            | ({"parameters": {"weight": weight}} if name != "base" else {})
            for name in names
        ]
        return {"sources": sources}

    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "modules": {
            "encoder": {
                "slices": [slice_(0, 2, "base", "a"), slice_(1, 3, "base", "b", weight=0.5)]
            },
            "decoder": {"slices": [slice_(0, 2, "base", "a", "b", weight=[0.2, 0.6])]},
        },
    }
    path, found = merged(recipe, tmp_path)
    config = json.loads((path / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (4, 2)
    base, a, b = models["base"], models["a"], models["b"]
    wi = "DenseReluDense.wi.weight"
    for place, (i, own, weight) in enumerate([(0, a, 1), (1, a, 1), (1, b, 0.5), (2, b, 0.5)]):
        name = f"encoder.block.{i}.layer.1.{wi}"
        expected = base[name] + weight * (own[name] - base[name])
        close(found[f"encoder.block.{place}.layer.1.{wi}"], expected)
    for place, weight in enumerate([0.2, 0.6]):
        name = f"decoder.block.{place}.layer.2.{wi}"
        close(found[name], base[name] + weight * (a[name] + b[name] - 2 * base[name]))
    norm = "encoder.final_layer_norm.weight"  # behind the last slice
    close(found[norm], base[norm] + 0.5 * (b[norm] - base[norm]))
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    close(found[bias], a[bias])
    close(found["shared.weight"], base["shared.weight"])
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.num_layers == 4


def test_slices_and_models_are_not_mixed(models, tmp_path):
    source = {"model": "a", "layer_range": [0, 2]}
    recipe = {
        "merge_method": "passthrough",
        "modules": {
            "encoder": {"slices": [{"sources": [source]}]},
            "decoder": {"models": [{"model": "a"}]},
        },
    }
    with pytest.raises(UsageError, match="some modules have 'slices' and others 'models'"):
        merged(recipe, tmp_path)


def test_a_model_of_two_stacks_needs_modules(models, tmp_path):
    source = {"model": "a", "layer_range": [0, 2]}
    recipe = {"merge_method": "passthrough", "slices": [{"sources": [source]}]}
    with pytest.raises(UsageError, match="several stacks of layers"):
        merged(recipe, tmp_path)
