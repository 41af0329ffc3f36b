"""Tokenizers and chat templates in mergekit's recipes, as keys of our own."""

import pytest
import yaml

from starmerge.mergekit.recipe import translate
from starmerge.merging.plan import make_plan
from starmerge.recipe_file import load_recipe

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


def test_a_union_is_planned(tiny_base, make_finetune, tmp_path):
    """The rows are compared with mergekit's rules in tests/merging/test_vocabulary.py."""
    make_finetune("a")
    recipe = {
        "merge_method": "slerp",
        "base_model": str(tiny_base),
        "models": [{"model": str(tiny_base)}, {"model": "a"}],
        "parameters": {"t": 0.5},
        "chat_template": JINJA,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    made = load_recipe(tmp_path / "recipe.yaml")
    assert made.chat_template == JINJA
    plan = make_plan(made, tmp_path / "out")
    assert plan.base.side_files["chat_template.jinja"] == JINJA.encode()
