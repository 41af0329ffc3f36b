"""Adapters in mergekit's recipes: alone, on the base, on other models."""

import numpy as np
import pytest
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from starmerge_models.errors import UsageError
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.plan import make_plan
from starmerge_models.recipe_file import load_recipe
from tests.conftest import edit_json
from tests.oracles import karcher as karcher_oracle
from tests.oracles import linear as linear_oracle
from tests.oracles import mergekit as oracle
from tests.oracles import slerp as slerp_oracle


@pytest.fixture
def models(tiny_base, make_adapter, make_finetune):
    """Two adapters of the base, one of a fine-tune, and the fine-tune."""
    tuned = make_finetune("tuned", scale=0.05)
    made = {
        "base": tiny_base,
        "one": make_adapter("one", seed=1),
        "two": make_adapter("two", seed=2, target_modules=["down_proj"]),
        "tuned": tuned,
        "on_tuned": make_adapter("on_tuned", base=tuned, seed=3),
    }
    for name, base in (("one", tiny_base), ("two", tiny_base), ("on_tuned", tuned)):
        edit_json(made[name] / "adapter_config.json", base_model_name_or_path=str(base))
    return made


def merged(recipe, models, folder):
    """The weights that a recipe makes, in which models stand by their names in braces."""
    file = folder / "recipe.yaml"
    text = yaml.safe_dump(recipe)
    for name, path in models.items():
        text = text.replace(f"{{{name}}}", str(path))
    file.write_text(text)
    output = folder / f"out-{len(list(folder.glob('out-*')))}"
    result = run(make_plan(load_recipe(file), output), Threads())
    return {n: t.double().numpy() for n, t in load_file(result.path / "model.safetensors").items()}


def folded(models, name, *adapters):
    """The weights of a model with adapters merged into it by PEFT, as mergekit does it."""
    model = AutoModelForCausalLM.from_pretrained(models[name])
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, models[adapter]).merge_and_unload()
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


def entries(*references, **parameters):
    """Entries of 'models', with a list of the values of each parameter."""
    return [
        {"model": model, "parameters": {key: values[i] for key, values in parameters.items()}}
        for i, model in enumerate(references)
    ]


LINEAR = {"merge_method": "linear"}
ON_BASE = entries("{base}+{one}", "{base}+{two}", weight=[0.25, 0.5])


@pytest.mark.parametrize(
    "recipe",
    [
        LINEAR | {"models": ON_BASE},
        LINEAR | {"models": entries("{one}", "{two}", weight=[0.25, 0.5])},
        LINEAR | {"base_model": "{base}", "models": ON_BASE},
        LINEAR | {"base_model": "{base}", "models": entries("{one}", "{two}", weight=[0.25, 0.5])},
        LINEAR
        | {
            "models": [
                {
                    "model": {"model": {"path": "{base}"}, "lora": {"path": "{one}"}},
                    "parameters": {"weight": 0.25},
                },
                {
                    "model": {"model": "{base}", "lora": "{two}"},
                    "parameters": {"weight": 0.5},
                },
            ]
        },
    ],
    ids=["on the base", "alone", "base given", "alone, base given", "as mappings"],
)
def test_linear_of_adapters_without_the_base_among_them(recipe, models, tmp_path):
    found = merged(recipe, models, tmp_path)
    one, two = folded(models, "base", "one"), folded(models, "base", "two")
    for name, weight in found.items():
        expected = (0.25 * one[name] + 0.5 * two[name]) / 0.75
        np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-6)
    unnormalized = recipe | {"parameters": {"normalize": False}}
    with pytest.raises(UsageError, match="no model changes lm_head.weight, which a sum of weights"):
        merged(unnormalized, models, tmp_path)


def test_linear_counts_a_base_that_is_listed_or_that_a_weight_reaches(models, tmp_path):
    listed = {"models": [*ON_BASE, *entries("{base}", weight=[0.75])]}
    reached = {"base_model": "{base}", "models": ON_BASE, "parameters": {"weight": 0.75}}
    base = folded(models, "base")
    deltas = [folded(models, "base", name) for name in ("one", "two")]
    for number, recipe in enumerate((listed, reached)):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = merged(LINEAR | recipe, models, folder)
        for name, weight in found.items():
            steps = [own[name] - base[name] for own in deltas]
            expected = linear_oracle.linear(base[name], steps, [0.25, 0.5], base_weight=0.75)
            np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reference", ["{base}+{one}", "{one}"])
def test_ties_of_an_adapter_and_a_fine_tune_with_an_adapter(reference, models, tmp_path):
    recipe = {
        "merge_method": "ties",
        "base_model": "{base}",
        "models": entries(reference, "{tuned}+{on_tuned}", weight=[0.6, 0.8], density=[1, 1]),
        "parameters": {"normalize": False},
    }
    found = merged(recipe, models, tmp_path)
    base, one = folded(models, "base"), folded(models, "base", "one")
    two = folded(models, "tuned", "on_tuned")
    for name, weight in found.items():
        deltas = [one[name] - base[name], two[name] - base[name]]
        update = oracle.merged(deltas, [0.6, 0.8], consensus=True, normalize=False)
        decided = np.abs(0.6 * deltas[0] + 0.8 * deltas[1]) > 1e-6
        np.testing.assert_allclose(
            weight[decided], (base[name] + update)[decided], rtol=0, atol=2e-6
        )
        assert decided.mean() > 0.99


METHODS_ON_WEIGHTS = {
    "nuslerp": lambda one, two: slerp_oracle.nuslerp(one, two, [0.3, 0.9]),
    "multislerp": lambda one, two: oracle.multislerp([one, two], [0.3, 0.9]),
    "karcher": lambda one, two: karcher_oracle.karcher([one, two]),
    "linear": lambda one, two: (0.3 * one + 0.9 * two) / 1.2,
}


@pytest.mark.parametrize("method", METHODS_ON_WEIGHTS)
def test_methods_on_weights_take_models_with_adapters(method, models, tmp_path):
    weight = {} if method == "karcher" else {"weight": [0.3, 0.9]}
    on = ["{base}+{one}", "{tuned}+{on_tuned}"]
    found = merged({"merge_method": method, "models": entries(*on, **weight)}, models, tmp_path)
    one, two = folded(models, "base", "one"), folded(models, "tuned", "on_tuned")
    for name, weight in found.items():
        expected = METHODS_ON_WEIGHTS[method](one[name], two[name])
        np.testing.assert_allclose(weight, expected, rtol=0, atol=2e-6)


def test_slerp_from_a_model_to_the_same_with_an_adapter(models, tmp_path):
    recipe = {
        "merge_method": "slerp",
        "base_model": "{tuned}",
        "models": entries("{tuned}", "{tuned}+{on_tuned}"),
        "parameters": {"t": 0.4},
    }
    found = merged(recipe, models, tmp_path)
    one, two = folded(models, "tuned"), folded(models, "tuned", "on_tuned")
    for name, weight in found.items():
        expected = slerp_oracle.slerp(one[name], two[name], 0.4)
        np.testing.assert_allclose(weight, expected, rtol=0, atol=2e-6)


def test_passthrough_bakes_an_adapter_in(models, tmp_path):
    recipe = {"merge_method": "passthrough", "models": [{"model": "{tuned}+{on_tuned}"}]}
    found = merged(recipe, models, tmp_path)
    expected = folded(models, "tuned", "on_tuned")
    for name, weight in found.items():
        np.testing.assert_allclose(weight, expected[name], rtol=0, atol=1e-6)
    recipe["parameters"] = {"scale": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}
    with pytest.raises(UsageError, match="passthrough: the scale of .*mlp.* which no adapter chan"):
        merged(recipe, models, tmp_path)


def test_slices_of_models_with_adapters(models, tmp_path):
    def source(model, first, last):
        return {"model": model, "layer_range": [first, last]}

    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source("{base}+{one}", 0, 2)]},
            {"sources": [source("{tuned}+{on_tuned}", 1, 2)]},
            {"sources": [source("{base}", 0, 1)]},
        ],
    }
    found = merged(recipe, models, tmp_path)
    one, two = folded(models, "base", "one"), folded(models, "tuned", "on_tuned")
    base = folded(models, "base")
    for tensor in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
        for place, (own, i) in enumerate([(one, 0), (one, 1), (two, 1), (base, 0)]):
            expected = own[f"model.layers.{i}.{tensor}"]
            np.testing.assert_allclose(
                found[f"model.layers.{place}.{tensor}"], expected, rtol=0, atol=1e-6
            )


def test_an_adapter_as_base_says_what_to_do(models, tmp_path):
    recipe = {
        "merge_method": "ties",
        "base_model": "{one}",
        "models": entries("{two}", weight=[1]),
    }
    with pytest.raises(UsageError, match="is an adapter.*base_model"):
        merged(recipe, models, tmp_path)
