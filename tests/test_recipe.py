"""Recipes: what is understood, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from starmerge_models.checkpoints.source import resolve_local
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.recipe import make_recipe, parse_models
from starmerge_models.recipe_file import load_recipe, write_recipe

_EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))

_GOOD: dict[str, Any] = {"base": "org/base", "models": ["org/a", "org/b@v2"]}


def test_names_models_after_their_paths_and_fills_in_defaults() -> None:
    recipe = make_recipe(_GOOD)
    assert [(entry.name, entry.path) for entry in recipe.models] == [
        ("a", "org/a"),
        ("b", "org/b@v2"),
    ]
    assert recipe.method == "star"
    assert recipe.parameters["eta"] == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modles": []}, "unknown key 'modles'. Did you mean 'models'?"),
        ({"models": []}, "models: List should have at least 1 item"),
        ({"models": ["x/a", "y/a"]}, "two models are called 'a'"),
        ({"models": [{"path": "a", "nmae": "b"}]}, "nmae"),
        ({"models": "org/a"}, "models"),
        ({"method": "starr"}, "No method is called 'starr'. Did you mean 'star'?"),
        ({"parameters": {"etaa": 3}}, "no parameter 'etaa'. Did you mean 'eta'?"),
        ({"parameters": {"eta": 0}}, "eta: Input should be greater than 0 (got 0)"),
        ({"parameters": {"eta": 101}}, "less than or equal to 100"),
        ({"parameters": {"eta": float("nan")}}, "eta"),
        ({"parameters": {"rank": 0}}, "rank"),
        ({"method": "average", "parameters": {"eta": 3}}, "It has none."),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_refuses_a_wrong_recipe_and_says_what_is_wrong(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        make_recipe(_GOOD | changes)
    assert message in str(error.value)


def test_reads_back_what_it_writes(tmp_path: Path) -> None:
    recipe = make_recipe(_GOOD | {"parameters": {"eta": 55.5}, "dtype": "float16"})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_paths_beside_a_recipe_are_meant_so(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "a").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"base": "org/base", "models": ["adapters/a", "org/b"]})
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.base == "org/base"
    assert [entry.path for entry in recipe.models] == [str(tmp_path / "adapters" / "a"), "org/b"]


@pytest.mark.parametrize("content", ["a: [", "- list", "just text", ""])
def test_refuses_files_that_are_no_recipes(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")


def test_models_can_be_named_on_the_command_line(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert parse_models(["x=org/a@v1", "org/c@main", str(odd)]) == [
        {"name": "x", "path": "org/a@v1"},
        {"name": "c", "path": "org/c@main"},
        {"name": "a=b", "path": str(odd)},
    ]


@pytest.mark.parametrize("path", _EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid_and_name_models_that_are_there(path: Path) -> None:
    recipe = load_recipe(path)
    assert all(resolve_local(entry.path).path.is_dir() for entry in recipe.models)


def test_a_recipe_is_written_for_whoever_reads_it_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("base", "made/inside"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(
        {"base": "base", "models": ["made/inside", "org/model@main"], "method": "star+ties"}
    )
    file = Path("made/recipe.yaml")
    write_recipe(recipe, file)
    content = yaml.safe_load(file.read_text())
    assert content["base"] == str(tmp_path / "base")
    assert [model["path"] for model in content["models"]] == ["inside", "org/model@main"]
    monkeypatch.chdir("/")
    read = load_recipe(tmp_path / file)
    assert read.base == str(tmp_path / "base")
    assert read.models[0].path == str(tmp_path / "made" / "inside")
    assert read.make_pipeline() == recipe.make_pipeline()


def test_a_recipe_replaces_nothing_unasked(tmp_path: Path) -> None:
    recipe = make_recipe({"base": "a/b", "models": ["c/d"]})
    file = tmp_path / "new" / "recipe.yaml"
    write_recipe(recipe, file)
    with pytest.raises(UsageError, match="exists.*--overwrite"):
        write_recipe(recipe, file)
    file.write_text("old")
    write_recipe(recipe, file, overwrite=True)
    assert load_recipe(file) == recipe
    assert [path.name for path in file.parent.iterdir()] == ["recipe.yaml"]
    with pytest.raises(UsageError, match="ends in .yaml"):
        write_recipe(recipe, tmp_path / "recipe.json")
    with pytest.raises(UsageError, match="is a folder"):
        (tmp_path / "folder.yaml").mkdir()
        write_recipe(recipe, tmp_path / "folder.yaml")
    with pytest.raises(StarmergeError, match="recipe.yaml is a file"):
        write_recipe(recipe, file / "recipe.yaml")


def test_references_of_several_places_are_written_and_read_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "lora", "c++"):
        (tmp_path / "models" / name).mkdir(parents=True)
    models = ["models/a+models/lora[0:2],org/b[1:3]", "models/c++", "org/b@v2+models/lora"]
    recipe = make_recipe({"base": "models/base[0:2],org/b[1:3]", "models": models})
    file = tmp_path / "models" / "recipe.yaml"
    write_recipe(recipe, file)
    written = yaml.safe_load(file.read_text())
    assert written["base"] == "base[0:2],org/b[1:3]"
    assert [entry["path"] for entry in written["models"]] == [
        "a+lora[0:2],org/b[1:3]",
        "c++",
        "org/b@v2+lora",
    ]
    read = load_recipe(file)
    folder = tmp_path / "models"
    assert read.base == f"{folder}/base[0:2],org/b[1:3]"
    assert [entry.path for entry in read.models] == [
        f"{folder}/a+{folder}/lora[0:2],org/b[1:3]",
        f"{folder}/c++",
        f"org/b@v2+{folder}/lora",
    ]
