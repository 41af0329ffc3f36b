"""Tokenizers and chat templates in mergekit's recipes, as keys of our own."""

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from starmerge_models.mergekit.recipe import translate
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.plan import make_plan
from starmerge_models.recipe_file import load_recipe
from tests.merging.test_vocabulary import TABLES, base, tune

__all__ = ["base", "tune"]  # fixtures

TIES = {
    "merge_method": "task_arithmetic",
    "base_model": "org/base",
    "models": [{"model": "org/a"}, {"model": "b+lora"}],
    "parameters": {"weight": 0.5},
}
JINJA = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (None, None)),
        ({"tokenizer_source": "base"}, (None, None)),
        ({"tokenizer_source": "union"}, ("union", None)),
        ({"tokenizer_source": "org/base"}, (None, None)),
        ({"tokenizer_source": "org/a"}, ("a", None)),
        ({"tokenizer_source": "b+lora"}, ("b+lora", None)),
        ({"tokenizer_source": "org/other@v2"}, ("org/other@v2", None)),
        (
            {"tokenizer_source": {"model": {"path": "org/other", "revision": "v2"}}},
            ("org/other@v2", None),
        ),
        ({"tokenizer": {}}, ("union", None)),
        ({"tokenizer": {"source": "base", "tokens": {}}}, (None, None)),
        ({"tokenizer": {"source": "org/a"}}, ("a", None)),
        ({"chat_template": JINJA}, (None, JINJA)),
        ({"chat_template": JINJA, "tokenizer_source": "union"}, ("union", JINJA)),
    ],
)
def test_a_tokenizer_is_chosen_by_our_keys(keys, expected):
    made = translate(TIES | keys, where="recipe.yaml")
    assert (made.get("tokenizer"), made.get("chat_template")) == expected


def merged(recipe, folder):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    made = load_recipe(folder / "recipe.yaml")
    return run(make_plan(made, folder / "out"), Threads()).path


def by_token(folder, name):
    """The rows of a table in float64, by the tokens of its tokenizer."""
    table = load_file(folder / "model.safetensors")[name].double().numpy()
    tokens = AutoTokenizer.from_pretrained(folder).get_vocab()
    return {token: table[number] for token, number in tokens.items()}


@pytest.mark.parametrize("name", TABLES)
def test_the_rows_of_a_union_follow_mergekits_rules(name, base, tune, tmp_path):
    a = tune("a", ["<|im_start|>", "<|im_end|>"], seed=1)
    b = tune("b", ["<tool>"], seed=2, rows=66)
    recipe = {
        "merge_method": "linear",
        "base_model": "base",
        "models": [
            {"model": model, "parameters": {"weight": weight}}
            for model, weight in (("base", 0.2), ("a", 0.5), ("b", 0.3))
        ],
        "tokenizer": {"source": "union"},
        "chat_template": JINJA,
    }
    path = merged(recipe, tmp_path)
    assert AutoTokenizer.from_pretrained(path).chat_template == JINJA
    found = by_token(path, name)
    ours, of_a, of_b = (by_token(folder, name) for folder in (base, a, b))
    assert found.keys() == of_a.keys() | of_b.keys()
    for token, row in found.items():
        # A token of one model alone has its row in all; the base's are merged.
        own = of_a.get(token) if token not in ours else None
        own = of_b.get(token) if token not in ours and own is None else own
        expected = own
        if token in ours:
            expected = 0.2 * ours[token] + 0.5 * of_a[token] + 0.3 * of_b[token]
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-6)


def test_the_tokenizer_of_a_model(base, tune, tmp_path):
    tune("a", ["<|im_start|>"], template="{{ messages }}")
    recipe = TIES | {"base_model": "base", "models": [{"model": "a"}], "tokenizer_source": "a"}
    found = AutoTokenizer.from_pretrained(merged(recipe, tmp_path))
    assert "<|im_start|>" in found.get_vocab()
    assert found.chat_template == "{{ messages }}"
