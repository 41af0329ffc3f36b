"""Recipes of mergekit: its own results, its settings, and what is refused by name."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from starmerge_models.checkpoints.layers import layers
from starmerge_models.deltas import Dense
from starmerge_models.errors import UsageError
from starmerge_models.mergekit.family import FAMILY, merge_sparsified
from starmerge_models.mergekit.settings import PARAMETERS, Setting, resolve
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.plan import make_plan
from starmerge_models.merging.verify import verify
from starmerge_models.methods import Sce
from starmerge_models.methods.kinds.masks import keep_probabilities, l1_factor
from starmerge_models.recipe import Recipe, make_recipe
from starmerge_models.recipe_file import load_recipe
from tests.golden.mergekit.inputs import CONFIG, DTYPES, MODELS, model_tensors, shapes
from tests.merge_one import merge_one
from tests.oracles import dare as dare_oracle
from tests.oracles import della as della_oracle
from tests.oracles import linear as linear_oracle
from tests.oracles import mergekit as oracle

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit"
RECIPES = {path.stem: path for path in sorted((GOLDEN / "recipes").glob("*.yaml"))}
IGNORED = {
    "precedence": ("normalize", [("a", "normalize"), ("a", "lambda"), ("a", "unheard_of")]),
    "ties_base_listed": ("weight, density", [("base", "weight"), ("base", "density")]),
}
"""Recipes in which mergekit ignores something: what the message names, and what has to go."""
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-10}
"""Of float32 half an ulp; of the others an ulp, since both round and may differ by one."""
LABELS = ["float32", "bfloat16"]
SMALL = ("model.layers.2.mlp.down_proj.weight", "model.layers.2.input_layernorm.weight")
"""Tensors whose differences are much smaller than the others'."""
STACKED = [
    *("modules_slices", "slices_linear", "slices_passthrough", "slices_slerp", "slices_ties"),
]
"""Recipes whose layers have other numbers than in the models."""
MERGED = [
    (name, label)
    for name in sorted(set(RECIPES) - set(STACKED))
    for label in LABELS
    # There mergekit rounds the inputs, and we the result: they are to be rounded already.
    if (name, label) != ("dtype_bfloat16", "float32")
    # There mergekit's importance is rounding: its softmax has the dtype of the models.
    and (name, label) != ("arcee_fusion", "bfloat16")
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The folder of the folders float32 and bfloat16 with the tiny Llama and its fine-tunes."""
    folder = tmp_path_factory.mktemp("mergekit")
    for dtype in DTYPES:
        label = str(dtype).removeprefix("torch.")
        for model in MODELS:
            place = folder / label / model
            place.mkdir(parents=True)
            (place / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": label}))
            save_file(model_tensors(model, dtype), place / "model.safetensors", {"format": "pt"})
    return folder


@cache
def weights(label):
    """The stored weights of all models in float64, by model and tensor."""
    dtype = getattr(torch, label)
    return {
        model: {name: x.double().numpy() for name, x in model_tensors(model, dtype).items()}
        for model in MODELS
    }


@cache
def golden(name):
    return load_file(RECIPES[name].with_suffix(".safetensors"))


@cache
def as_stored(name):
    return yaml.safe_load(RECIPES[name].read_text())


def content(name):
    """A recipe, without what mergekit ignores in it."""
    recipe = deepcopy(as_stored(name))
    for model, key in IGNORED.get(name, ("", []))[1]:
        (entry,) = (entry for entry in recipe["models"] if entry["model"] == model)
        del entry["parameters"][key]
    return recipe


def translated(recipe, folder):
    """A recipe read from a file in the folder where its models are."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return load_recipe(folder / "recipe.yaml")


def dtypes(name, label):
    """What mergekit computes in, and what it stores."""
    recipe = content(name)
    computed = recipe.get("dtype", label)
    return computed, recipe.get("out_dtype", computed)


def tolerance(name, label, tensor, recipe):
    """How far mergekit's merge may be from ours, entry by entry.

    It rounds after each step in what it computes in: measured against float64, by up to 8 units of
    the largest weight there. We round once, by half a unit. Weights of both signs make the quotient
    of sums worse by their condition. Then both round to what is stored.
    """
    largest = np.max([np.abs(weights(label)[model][tensor]) for model in MODELS], axis=0)
    computed, stored = dtypes(name, label)
    units = 8.5 * (largest + cancellation(name, label, tensor, recipe))
    return UNITS[computed] * units + (2 * UNITS[stored] * largest if stored != computed else 0)


def cancellation(name, label, tensor, recipe):
    """How much larger the terms of a normalised sum are, in the update, than without cancelling."""
    method = recipe.parameters["merge_method"]
    votes = method in FAMILY and FAMILY[method].consensus
    if not votes or not resolved(recipe, tensor)[0]["normalize"]:
        return 0.0
    deltas, factors, _ = thinned(name, label, tensor, recipe)
    x = np.stack([w * delta for w, delta in zip(factors, deltas, strict=True)])
    agrees = np.sign(x) == np.where(x.sum(0) >= 0, 1, -1)
    w = np.array(factors).reshape(-1, *[1] * (x.ndim - 1))
    mass = np.abs((agrees * w).sum(0))
    condition = np.divide((agrees * np.abs(w)).sum(0), mass, out=np.ones_like(mass), where=mass > 0)
    terms = np.abs(np.where(agrees, x, 0)).sum(0)
    return (condition - 1) * np.divide(terms, mass, out=np.zeros_like(mass), where=mass > 0)


def resolved(recipe, tensor):
    """What the settings of a translated recipe come to for a tensor, with the models' names."""
    parameters = recipe.parameters
    settings = [Setting(**setting) for setting in parameters["settings"]]
    names = [entry.name for entry in recipe.models] + ["base"] * parameters["with_base"]
    context = SimpleNamespace(name=tensor, layer=layers(shapes()).get(tensor))
    number = 0 if parameters["slices"] else None
    found = resolve(parameters["merge_method"], settings, names, context, number)
    return found.shared, dict(zip(names, found.own, strict=True))


def masks(name, label, tensor):
    """mergekit's own masks by model, where chance or the order of equals decides what stays."""
    prefix, shape = f"{label}/{tensor}/mask/", shapes()[tensor]
    return {
        key.removeprefix(prefix): mask.reshape(shape).bool()
        for key, mask in golden(name).items()
        if key.startswith(prefix)
    }


def thinned(name, label, tensor, recipe):
    """The task vectors of the task-arithmetic family by the reference, and their weights."""
    shared, own = resolved(recipe, tensor)
    drawn, made = masks(name, label, tensor), []
    base = weights(label)["base"][tensor]
    for model, parameters in own.items():
        delta = weights(label)[model][tensor] - base
        density = parameters.get("density", 1.0)
        if density < 1:
            if model in drawn:
                mask = drawn[model].numpy()
            elif "gamma" in parameters:
                mask = oracle.between_outliers(delta, density, parameters["gamma"])
            else:
                mask = oracle.by_magnitude(delta, density)
            delta = oracle.thinned(delta, mask, shared["rescale"])
        made.append(delta)
    return made, [parameters["weight"] for parameters in own.values()], shared


def undecided(name, label, tensor, recipe):
    """Entries whose elected sign depends on how mergekit rounds in what it computes in.

    Subtraction, two roundings of the rescale, the weight, the product and the sum change the sum
    by at most six roundings of its terms.
    """
    method = recipe.parameters["merge_method"]
    if method == "arcee_fusion":
        return near_threshold(label, tensor)
    votes = method == "sce" or (method in FAMILY and FAMILY[method].consensus)
    if dtypes(name, label)[0] == "float32" or not votes:
        return np.zeros(shapes()[tensor], dtype=bool)
    if method == "sce":
        base = weights(label)["base"][tensor]
        deltas = [weights(label)[entry.name][tensor] - base for entry in recipe.models]
        factors = [1.0] * len(deltas)
    else:
        deltas, factors, _ = thinned(name, label, tensor, recipe)
    x = [w * delta for w, delta in zip(factors, deltas, strict=True)]
    terms = sum(map(np.abs, x))
    return (np.abs(sum(x)) <= 6 * UNITS["bfloat16"] * terms) & (terms > 0)


def near_threshold(label, tensor):
    """Entries of which mergekit's rounding may decide whether they are important.

    A divergence sums p log(p/q) over a row, with Σp = 1: four roundings of it, mostly of p/q.
    """
    base, model = weights(label)["base"][tensor], weights(label)["a"][tensor]
    scores, threshold = oracle.importance(base, model)
    rounding = 4 * UNITS[label] * np.abs(model - base)
    # The threshold is a sum of quartiles, which are scores themselves.
    near = np.abs(scores - threshold) <= rounding + 4 * np.quantile(rounding, 0.75)
    return near & (model != base)


def assert_same(name, label, recipe, merged, tensors):
    """Compare merged tensors with mergekit's."""
    for tensor in tensors:
        theirs = golden(name)[f"{label}/{tensor}"]
        decided = ~undecided(name, label, tensor, recipe)
        error = np.abs(merged[tensor].double().numpy() - theirs.double().numpy())
        bound = tolerance(name, label, tensor, recipe)
        assert np.all(error[decided] <= bound[decided]), tensor
        # The small differences of these have divergences below mergekit's rounding.
        if name != "arcee_fusion" or tensor not in SMALL:
            assert decided.mean() > 0.75, tensor


def golden_tensors(name, label):
    """The tensors whose result is stored: those that are decided by the recipe, and the others."""
    names = [key.split("/")[1] for key in golden(name) if key.count("/") == 1 and label in key]
    open_ = {key.split("/")[1] for key in golden(name) if key.startswith(label) and "mask" in key}
    return [n for n in names if n not in open_], [n for n in names if n in open_]


def with_masks(name, label, recipe, tensors):
    """Merge tensors of which mergekit's masks say what stays."""
    merged = {}
    for tensor in tensors:
        base = weights(label)["base"][tensor]
        stored = getattr(torch, dtypes(name, label)[1])
        if recipe.parameters["merge_method"] == "sce":
            deltas = [weights(label)[entry.name][tensor] - base for entry in recipe.models]
            mask = golden(name)[f"{label}/{tensor}/mask"].numpy().astype(bool)
            selected = [Dense(torch.from_numpy(np.where(mask, delta, 0.0))) for delta in deltas]
            update = merge_one(Sce(), selected).delta.to_dense().reshape(base.shape)
        else:
            update = agreed(name, label, tensor, recipe)
        merged[tensor] = (torch.from_numpy(base) + update).to(stored)
    return merged


def agreed(name, label, tensor, recipe):
    """What our own formulas make of the task vectors, given mergekit's masks."""
    shared, own = resolved(recipe, tensor)
    drawn, made = masks(name, label, tensor), []
    base = weights(label)["base"][tensor]
    for model in own:
        delta = torch.from_numpy(weights(label)[model][tensor] - base)
        if model in drawn:
            mask = drawn[model]
            factor = l1_factor(delta, mask) if shared["rescale"] else 1.0
            delta = torch.where(mask, factor * delta, 0.0)
        else:
            mask = None
            deltas, _, _ = thinned(name, label, tensor, recipe)
            delta = torch.from_numpy(deltas[list(own).index(model)])
        made.append(delta)
    factors = [parameters["weight"] for parameters in own.values()]
    return merge_sparsified(
        torch.stack(made),
        factors,
        total_weight=sum(factors),
        consensus=FAMILY[recipe.parameters["merge_method"]].consensus,
        normalize=shared["normalize"],
        lambda_=shared["lambda"],
    )


@pytest.mark.parametrize(("name", "label"), MERGED)
def test_a_recipe_gives_what_mergekit_gives(name, label, inputs, tmp_path):
    recipe = translated(content(name), inputs / label)
    merged = merge(recipe, tmp_path / "out")
    assert {str(x.dtype) for x in merged.values()} == {f"torch.{dtypes(name, label)[1]}"}
    decided, by_mask = golden_tensors(name, label)
    assert len(decided) + len(by_mask) >= 7
    assert_same(name, label, recipe, merged, decided)
    assert_same(name, label, recipe, with_masks(name, label, recipe, by_mask), by_mask)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers_are_those_of_mergekit(name, label, inputs, tmp_path):
    recipe = translated(content(name), inputs / label)
    merged = merge(recipe, tmp_path / "out")
    numbers = {int(tensor.split(".")[2]) for tensor in merged if "layers" in tensor}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert numbers == set(range(config["num_hidden_layers"]))
    verdict = verify(tmp_path / "out", repeat="all")
    assert verdict.is_right and set(verdict.inputs.values()) == {"same"}
    for key, theirs in golden(name).items():
        if key.startswith(label) and key.count("/") == 1:
            tensor = key.split("/")[1]
            error = (merged[tensor].double() - theirs.double()).abs()
            near = error <= 8.5 * UNITS[label] * theirs.double().abs().max()
            # At cuts through equal magnitudes, and where signs cancel, others may stay.
            assert near.double().mean() >= (0.99 if "ties" in name else 1), tensor


def test_layers_that_are_passed_through_are_copied(inputs, tmp_path):
    recipe = translated(content("slices_passthrough"), inputs / "float32")
    result = run(make_plan(recipe, tmp_path / "out"), Threads())
    scaled = {
        f"model.layers.{layer}.{module}.weight"
        for layer in (2, 3)
        for module in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert {record["name"] for record in result.report.tensors} == scaled
    del recipe.parameters["settings"][:]
    result = run(make_plan(recipe, tmp_path / "plain"), Threads())
    assert result.report.tensors == []
    assert result.report.content["unchanged"] == []
    assert "0 tensors merged, 48 left as they are" in result.report.summary()
    merged = load_file(result.path / "model.safetensors")
    assert torch.equal(
        merged["model.layers.3.mlp.up_proj.weight"],
        model_tensors("b", torch.float32)["model.layers.2.mlp.up_proj.weight"],
    )


@pytest.mark.parametrize("label", LABELS)
def test_arcee_fusion_takes_what_the_reference_takes(label, inputs, tmp_path):
    merged = merge(translated(content("arcee_fusion"), inputs / label), tmp_path / "out")
    for tensor, found in merged.items():
        base, model = weights(label)["base"][tensor], weights(label)["a"][tensor]
        scores, threshold = oracle.importance(base, model)
        near = np.isclose(scores, threshold, rtol=1e-9, atol=0)  # other sums of the same terms
        assert near.sum() <= 1 or not scores.any()
        expected = np.where(scores >= threshold, model, base)
        np.testing.assert_array_equal(found.double().numpy()[~near], expected[~near])


def merge(recipe, output):
    return load_file(run(make_plan(recipe, output), Threads()).path / "model.safetensors")


def test_what_mergekit_computes_in_bfloat16_is_what_it_makes_of_rounded_models():
    stored = golden("dtype_bfloat16")
    for tensor in golden_tensors("dtype_bfloat16", "bfloat16")[0]:
        assert torch.equal(stored[f"float32/{tensor}"], stored[f"bfloat16/{tensor}"])


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_the_chances_of_della_are_mergekits(name):
    compared = 0
    for key, theirs in golden(name).items():
        label, tensor, *rest = key.split("/")
        if label == "float32" and rest[:1] == ["chance"]:
            model = rest[1]
            delta = model_tensors(model, torch.float32)[tensor]
            delta -= model_tensors("base", torch.float32)[tensor]
            rows = delta.reshape(theirs.shape) if delta.ndim == 1 else delta
            magnitudes = rows.abs().sort(1).values
            clear = (magnitudes.diff(dim=1) > 0).all(1)  # equal magnitudes: any order is right
            own = resolved(translated_alone(name), tensor)[1][model]
            ours = keep_probabilities(rows, own["density"], own["epsilon"])
            if clear.any():
                assert (
                    float((ours - theirs.double())[clear].abs().max()) < 2**-22
                )  # four float32 roundings
                compared += int(clear.sum())
    assert compared > 50


def translated_alone(name):
    """A golden recipe, whose models need not be there."""
    return load_recipe(RECIPES[name])


@pytest.mark.parametrize("name", json.loads((GOLDEN / "resolved.json").read_text()))
def test_the_parameters_come_to_what_mergekit_takes_them_for(name, tmp_path):
    recipe = translated(content(name), tmp_path)
    for tensor, theirs in json.loads((GOLDEN / "resolved.json").read_text())[name].items():
        shared, own = resolved(recipe, tensor)
        assert shared == pytest.approx(theirs["shared"], rel=1e-12), tensor
        given = {model: parameters for model, parameters in theirs["input"].items() if parameters}
        assert own.keys() - {"base"} == theirs["input"].keys() - {"base"}
        for model, parameters in given.items():
            assert own[model] == pytest.approx(parameters, rel=1e-12), (tensor, model)


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_what_mergekit_ignores_is_refused(name):
    with pytest.raises(UsageError, match=f"{IGNORED[name][0]}.*would"):
        load_recipe(RECIPES[name])


BOTH = ("base", "a")
TIES = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [{"model": "org/a", "parameters": {"weight": 1}}, {"model": "org/b"}],
    "parameters": {"weight": 0.5},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modls": []}, "unknown key 'modls', which mergekit ignores. Did you mean 'models'?"),
        ({"modules": {}}, "exactly one of 'models', 'slices' and 'modules'"),
        ({"modules": {"default": {}}, "models": None}, "the module 'default' has 'models' or"),
        ({"modules": {"decodr": {}}, "models": None}, "no module is called 'decodr'. Did you"),
        ({"modules": {"decoder": {"sclices": []}}, "models": None}, "a module has the unknown key"),
        (
            {"tokenizer": {"source": "base", "tokens": {"<a>": {"source": "org/a"}}}},
            "the key 'tokens' of 'tokenizer' is not supported: each new token has the row",
        ),
        ({"tokenizer": {"pad_to_multiple_of": 8}}, "the key 'pad_to_multiple_of' of 'tokenizer'"),
        ({"tokenizer": {"sauce": "base"}}, "'tokenizer' has the unknown key 'sauce'"),
        ({"tokenizer": {}, "tokenizer_source": "base"}, "both choose the tokenizer"),
        ({"chat_template": "chatml"}, "a template that only mergekit includes"),
        ({"chat_template": "auto"}, "chat_template is 'auto', which counts the models' templates"),
        ({"experts": []}, "the key 'experts' is not supported. .*mergekit-moe"),
        ({"gate_mode": "hidden"}, "the key 'gate_mode' is not supported"),
        ({"genome": {}}, "the key 'genome' is not supported. .*mergekit-evolve"),
        ({"merge_method": "passthrough"}, "passthrough: there are 2 models"),
        ({"merge_method": "tise"}, "no merge_method is called 'tise'. Did you mean 'ties'?"),
        ({"base_model": None}, "ties needs the key 'base_model'"),
        ({"models": []}, "'models' is empty"),
        ({"models": None}, "exactly one of 'models', 'slices' and 'modules'"),
        ({"models": [{"model": "org/base"}]}, "'org/base' is the only model"),
        ({"models": [{"model": "org/a"}, {"model": "org/a"}]}, "'org/a' is listed twice"),
        ({"models": [{"model": "a+b+c"}]}, "'a.b.c' is no model: one adapter may follow"),
        ({"models": [{"model": "org/a+"}]}, "'org/a.' is no model: one adapter may follow"),
        ({"base_model": "org/a+org/b"}, "base_model 'org/a.org/b' has an adapter"),
        ({"models": [{"model": "org/a", "wieght": 1}]}, "unknown key 'wieght'"),
        (
            {"models": [{"model": {"model": {"path": "org/a"}, "lora": {"pfad": "x"}}}]},
            "is no model: give its path or Hub id",
        ),
        (
            {"models": [{"model": {"model": "org/a", "override_architecture": "X"}}]},
            "the key 'override_architecture' of a model",
        ),
        ({"parameters": {"wieght": 1}}, "ties does not use the parameter 'wieght'"),
        ({"parameters": {"gamma": 0.1}}, "ties does not use the parameter 'gamma'"),
        ({"parameters": {"density": 1.5}}, "density: .*less than or equal to 1 .got 1.5"),
        ({"parameters": {"density": [0.5, -1]}}, "density: .*greater than or equal to 0"),
        ({"parameters": {"weight": "half"}}, "weight: .*'half'"),
        ({"parameters": {"weight": None}}, "weight: .*None"),
        ({"parameters": {"weight": float("nan")}}, "weight: .*finite"),
        ({"parameters": {"weight": []}}, "weight: The list is empty"),
        (
            {"parameters": {"weight": [{"filter": "mlp", "value": 1}, 2]}},
            "'weight' mixes plain values",
        ),
        ({"parameters": {"weight": [{"filter": "mlp"}]}}, "'weight': each entry needs a 'value'"),
        ({"dtype": "bf16"}, "dtype is 'bf16'. Did you mean"),
        ({"dtype": "int64"}, "dtype is 'int64'"),
        ({"dtype": "float64"}, "float64"),
        ({"slices": [], "models": None}, "'slices' is empty"),
        (
            {"slices": [{"sources": [{"model": "a", "layer_range": [8, 8]}]}], "models": None},
            r"'layer_range' is \[8, 8\]: it goes from the first layer, counted from 0",
        ),
        (
            {
                "slices": [
                    {
                        "sources": [
                            {"model": "org/base", "layer_range": [0, 8]},
                            {"model": "a", "layer_range": [0, 4]},
                        ]
                    }
                ],
                "models": None,
            },
            "'layer_range's of the sources of a slice, .*have different lengths",
        ),
        (
            {"slices": [{"sources": [{"model": "a", "layer_range": [0, 8]}]}], "models": None},
            "base_model 'org/base' is not a source of",
        ),
    ],
)
def test_what_does_not_run_is_refused_by_its_key(changes, message, tmp_path):
    recipe = {key: value for key, value in (TIES | changes).items() if value is not None}
    with pytest.raises(UsageError, match=f"recipe.yaml: .*{message}"):
        translated(recipe, tmp_path)


def test_everything_that_does_not_run_is_listed_at_once(tmp_path):
    recipe = TIES | {
        "chat_template": "auto",
        "experts": [],
        "gate_mode": "hidden",
        "tokenizer": {"tokens": {"<a>": {}}},
        "dtyp": "float32",
        "dtype": "bf16",
        "models": [{"model": {"model": "a", "override_architecture": "X"}, "wieght": 1}],
    }
    with pytest.raises(UsageError, match="7 things do not run") as raised:
        translated(recipe, tmp_path)
    for part in (
        "chat_template is 'auto'",
        "the keys 'experts', 'gate_mode'",
        "'tokens' of 'tokenizer'",
        "'dtyp'",
        "dtype is 'bf16'",
        "override_architecture",
        "'wieght'",
    ):
        assert part in str(raised.value)
    wrong = TIES | {
        "parameters": {"wieght": 1, "gamma": 1},
        "models": [{"model": "org/a", "parameters": {"density": 7}}],
    }
    with pytest.raises(UsageError, match="3 things do not run") as raised:
        translated(wrong, tmp_path)
    assert all(word in str(raised.value) for word in ("wieght", "gamma", "density"))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}]},
            "slerp: there are 2 models .a, b.",
        ),
        (
            {"merge_method": "nuslerp", "models": [{"model": m} for m in "abc"]},
            "nuslerp: it merges exactly two models",
        ),
        ({"merge_method": "model_stock", "models": [{"model": "a"}]}, "at least two"),
        (
            {
                "merge_method": "ties",
                "models": [{"model": "a"}],
                "parameters": {"weight": {"filter": "mlp", "value": 1}},
            },
            "parameter 'weight' of a is missing for the tensor lm_head.weight",
        ),
        (
            {
                "merge_method": "linear",
                "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "base"}],
            },
            "parameter 'weight' of the base is not given",
        ),
        ({"merge_method": "nearswap", "models": [{"model": m} for m in "ab"]}, "exactly one"),
        ({"merge_method": "arcee_fusion", "models": [{"model": m} for m in "ab"]}, "exactly one"),
        (
            {
                "merge_method": "multislerp",
                "models": [
                    {"model": m, "parameters": {"weight": w}} for m, w in (("a", 1), ("b", -1))
                ],
            },
            "multislerp: the weights sum to zero",
        ),
        (
            {
                "merge_method": "linear",
                "models": [{"model": m} for m in "ab"],
                "parameters": {"weight": [1, 0, 0]},
            },
            "linear: the weights sum to zero",
        ),
        (
            {
                "merge_method": "della",
                "models": [{"model": "a"}],
                "parameters": {"weight": 1, "density": 0.9},
            },
            "with density 0.9 and epsilon 0.15",
        ),
        (
            {
                "merge_method": "karcher",
                "models": [{"model": m} for m in "ab"],
                "parameters": {"max_iter": [10, 3]},
            },
            "karcher: max_iter for model.layers.1.*6.5",
        ),
        (
            {
                "merge_method": "slerp",
                "slices": [{"sources": [{"model": m, "layer_range": [0, 4]} for m in BOTH]}],
                "parameters": {"t": 0.5},
            },
            r"base has 3 layers, and \[0:4\] goes beyond",
        ),
    ],
)
def test_what_does_not_fit_the_models_is_refused_before_they_are_read(
    recipe, message, inputs, tmp_path
):
    made = translated({"base_model": "base", **recipe}, inputs / "float32")
    with pytest.raises(UsageError, match=message):
        make_plan(made, tmp_path / "out")


@pytest.mark.parametrize("name", ["gradients", "slerp_filters", "linear", "nuslerp", "karcher"])
def test_a_translated_recipe_can_be_written_and_run_again(name, inputs, tmp_path):
    recipe = translated(content(name), inputs / "float32")
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    first = run(make_plan(recipe, tmp_path / "first"), Threads())
    report = json.loads((first.path / "merge_report.json").read_text())
    again = Recipe.model_validate(report["recipe"])
    assert recipe.to_yaml() in (first.path / "README.md").read_text()
    second = run(make_plan(again, tmp_path / "second"), Threads())
    files = [result.path / "model.safetensors" for result in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_one_slice_of_all_layers_is_the_whole_model(inputs, tmp_path):
    recipe = content("slerp_filters")
    models = recipe.pop("models")
    sliced = recipe | {"slices": [{"sources": [m | {"layer_range": [0, 3]} for m in models]}]}
    whole = merge(translated(content("slerp_filters"), inputs / "float32"), tmp_path / "whole")
    merged = merge(translated(sliced, inputs / "float32"), tmp_path / "sliced")
    assert all(torch.equal(merged[name], whole[name]) for name in whole)


def test_the_parameters_of_a_slice_come_before_those_of_the_recipe(tmp_path):
    sources = [{"model": m, "layer_range": [0, 3]} for m in ("base", "a", "b")]
    sources[1]["parameters"] = {"weight": 3}
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [{"sources": sources, "parameters": {"weight": 2, "lambda": 4}}],
        "parameters": {"weight": 1, "lambda": 5, "density": 0.5},
    }
    shared, own = resolved(translated(recipe, tmp_path), "lm_head.weight")
    assert shared["lambda"] == 4
    assert own == {"a": {"weight": 3, "density": 0.5}, "b": {"weight": 2, "density": 0.5}}


def test_models_of_one_name_are_told_apart(tmp_path):
    models = ["x/base", "y/tuned", "z/tuned", "y/tuned/", "org/tuned@v2"]
    recipe = TIES | {"base_model": "x/other", "models": [{"model": m} for m in models]}
    made = translated(recipe, tmp_path)
    names = ["x/base", "tuned", "z/tuned", "y/tuned/", "org/tuned@v2"]
    assert [entry.name for entry in made.models] == names
    assert [entry.path for entry in made.models] == models


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_what_is_dropped_depends_on_seed_model_and_tensor(method, seed, inputs, tmp_path):
    density, weight = {"a": 0.4, "b": 0.7}, {"a": 0.5, "b": 0.8}
    recipe = translated(
        {
            "merge_method": method,
            "base_model": "base",
            "models": [
                {"model": m, "parameters": {"weight": weight[m], "density": density[m]}}
                for m in "ab"
            ],
        },
        inputs / "float32",
    )
    recipe = recipe.model_copy(update={"parameters": recipe.parameters | {"seed": seed}})
    merged = merge(recipe, tmp_path / "out")
    base = weights("float32")["base"]
    for name, shape in shapes().items():
        deltas = []
        for model in "ab":
            delta = weights("float32")[model][name] - base[name]
            p = 1 - density[model]
            if method == "della_linear":
                p = 1 - della_oracle.chances(delta, density[model], 0.15)
            drawn = drawn_mask(p, seed, model, name, delta.size).reshape(shape)
            deltas.append(oracle.thinned(delta, drawn, True))
        update = oracle.merged(deltas, list(weight.values()), consensus=False, normalize=False)
        np.testing.assert_allclose(merged[name].numpy(), base[name] + update, rtol=0, atol=3e-7)


def drawn_mask(p, seed, model, name, count):
    """Entry i stays if the i-th 32-bit random number is at least p_i * 2^32."""
    return np.array(dare_oracle.numbers(seed, model, name, count)) >= np.ravel(p) * 2**32


def test_adapters_are_models_like_others(tiny_base, make_adapter, make_finetune, tmp_path):
    adapter, tuned = make_adapter("adapter"), make_finetune("tuned")
    recipe = {
        "merge_method": "linear",
        "base_model": str(tiny_base),
        "models": [
            {"model": str(adapter), "parameters": {"weight": 0.25}},
            {"model": str(tuned), "parameters": {"weight": 0.5}},
            {"model": str(tiny_base), "parameters": {"weight": 0.75}},
        ],
    }
    merged = merge(translated(recipe, tmp_path), tmp_path / "out")
    base = load_file(tiny_base / "model.safetensors")
    full = load_file(tuned / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        delta = np.zeros(weight.shape)
        if key in factors:
            B, A = factors[key.replace("lora_A", "lora_B")], factors[key]
            delta = 2.0 * B.double().numpy() @ A.double().numpy()
        start = weight.double().numpy()
        deltas = [delta, full[name].double().numpy() - start]
        expected = linear_oracle.linear(start, deltas, [0.25, 0.5], base_weight=0.75)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [(None, 1.0), ((0, 1), 4.0), ((0, 5), 1.0), ((1, 5), 2.0), ((2, 5), 3.0), ((3, 5), 3.5)],
)
def test_a_list_is_spread_over_the_layers(layer, expected):
    # A single layer counts as the last; outside of layers the first value holds.
    assert PARAMETERS["linear"]["weight"].at([1.0, 3.0, 4.0], layer) == expected
    truth = expected < 3 if layer != (0, 1) else False
    assert PARAMETERS["linear"]["normalize"].at([True, False, False], layer) is truth


def test_layers_are_counted_by_what_their_names_begin_with():
    names = [
        "embed.weight",
        "encoder.layers.0.fc.weight",
        "encoder.layers.11.experts.3.w",
        "decoder.layers.1.fc.weight",
        "head.weight",
    ]
    assert layers(names) == {
        "encoder.layers.0.fc.weight": (0, 12),
        "encoder.layers.11.experts.3.w": (11, 12),
        "decoder.layers.1.fc.weight": (1, 2),
    }
