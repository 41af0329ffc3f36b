"""Files of several recipes, some of which are made of others."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import starmerge_models as sm
from starmerge_models.errors import UsageError
from starmerge_models.recipe_file import load_recipe, load_recipes
from tests.conftest import MakeAdapter, MakeFinetune

Run = Callable[..., subprocess.CompletedProcess[str]]


def mergekits(name: str | None, base: str, *models: str) -> dict[str, object]:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": model, "parameters": {"weight": 0.5}} for model in models],
    }
    return recipe if name is None else {"name": name, **recipe}


def write(file: Path, recipes: list[dict[str, object]]) -> Path:
    file.write_text(yaml.safe_dump_all(recipes))
    return file


@pytest.fixture
def folder(
    tiny_base: Path, make_adapter: MakeAdapter, make_finetune: MakeFinetune, tmp_path: Path
) -> Path:
    """A folder with a base, an adapter and two fine-tunes."""
    shutil.copytree(tiny_base, tmp_path / "base")
    make_adapter("adapter"), make_finetune("a", seed=1), make_finetune("b", seed=2)
    return tmp_path


def test_merges_that_are_made_of_merges(starmerge: Run, folder: Path) -> None:
    file = write(
        folder / "several.yaml",
        [
            mergekits(None, "first", "second", "b"),
            mergekits("second", "first", "first+adapter"),
            {"name": "first", "base": "base", "models": ["a"], "method": "average"},
        ],
    )
    out = folder / "out"
    planned = starmerge("merge", file, "-o", out, "--dry-run", cwd=folder)
    assert planned.returncode == 0, planned.stderr
    assert "Merges that are made of others, first, second among them" in planned.stdout
    finished = starmerge("merge", file, "-o", out, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    steps = folder / "out-steps"
    assert sorted(path.name for path in steps.iterdir()) == ["first", "second"]

    sm.merge(folder / "base", [folder / "a"], "average", output=folder / "1")
    half = sm.TaskArithmetic(alpha=0.5)
    reference = f"{folder / '1'}+{folder / 'adapter'}"
    sm.merge(folder / "1", [reference], half, output=folder / "2", any_base=True)
    sm.merge(folder / "1", [folder / "2", folder / "b"], half, output=folder / "3")
    for found, expected in ((steps / "first", "1"), (steps / "second", "2"), (out, "3")):
        weights = load_file(folder / expected / "model.safetensors")
        for name, weight in load_file(found / "model.safetensors").items():
            assert (weight - weights[name]).abs().max() < 1e-6

    # What is there is not made again; what has changed is, if it may.
    before = (steps / "first" / "merge_report.json").stat().st_mtime_ns
    again = starmerge("merge", file, "-o", out, "--overwrite", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is there already") == 2
    assert (steps / "first" / "merge_report.json").stat().st_mtime_ns == before
    shutil.rmtree(folder / "a")
    shutil.copytree(folder / "b", folder / "a")
    refused = starmerge("merge", file, "-o", folder / "out", cwd=folder)
    assert refused.returncode == 2
    shutil.rmtree(out)
    refused = starmerge("merge", file, "-o", out, cwd=folder)
    assert refused.returncode == 2, refused.stdout
    assert "first" in refused.stderr
    changed = starmerge("merge", file, "-o", out, "--overwrite", cwd=folder)
    assert changed.returncode == 0, changed.stderr
    assert "is there already" not in changed.stdout
    assert sm.verify(out).is_right


def test_a_failed_merge_loses_none_of_those_before_it(starmerge: Run, folder: Path) -> None:
    file = write(
        folder / "several.yaml",
        [mergekits("first", "base", "a"), mergekits(None, "base", "first", "missing/model")],
    )
    failed = starmerge("merge", file, "-o", folder / "out", cwd=folder)
    assert failed.returncode != 0
    assert "missing/model" in failed.stderr
    assert (folder / "out-steps" / "first" / "merge_report.json").is_file()
    assert not (folder / "out").exists()


def test_the_output_is_what_no_other_needs(folder: Path) -> None:
    named = [mergekits("x", "base", "y"), mergekits("y", "base", "a"), mergekits("z", "x", "b")]
    for file in (
        write(folder / "documents.yaml", named),
        folder / "list.yaml",
    ):
        if not file.exists():
            file.write_text(json.dumps(named))
        steps = load_recipes(file, folder / "out")
        assert [step.name for step in steps] == ["y", "x", "z"]
        own = folder / "out-steps"
        assert [step.output for step in steps] == [own / "y", own / "x", folder / "out"]
        assert steps[2].recipe.base == str(own / "x")
        assert steps[1].needs == (own / "y",)


def test_one_recipe_may_have_a_name(folder: Path) -> None:
    file = write(folder / "one.yaml", [mergekits("it", "base", "a")])
    (step,) = load_recipes(file, folder / "out")
    assert (step.output, step.name) == (folder / "out", None)


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ([("x", "base", "y"), ("y", "base", "x")], "made of each other: (x → y → x|y → x → y)"),
        ([("x", "base", "x"), (None, "base", "a")], "made of each other: x → x"),
        ([("x", "base", "a"), ("y", "base", "a")], "no recipe is made of 'x', 'y'"),
        ([("x", "base", "a"), ("x", "base", "b")], "two recipes are called 'x'"),
        ([(None, "base", "a"), (None, "base", "b")], "two recipes have no name"),
        ([("x/y", "base", "a"), (None, "base", "b")], "recipe 1 .x/y.: the name is 'x/y'"),
        ([("..", "base", "a"), (None, "base", "b")], r"the name is '\.\.'"),
    ],
)
def test_recipes_that_do_not_go_together(
    recipes: list[tuple[str | None, ...]], message: str, folder: Path
) -> None:
    file = write(folder / "several.yaml", [mergekits(*recipe) for recipe in recipes])
    with pytest.raises(UsageError, match=message):
        load_recipes(file, folder / "out")
    with pytest.raises(UsageError, match="holds 2 recipes"):
        load_recipe(file)


def test_a_mistake_in_a_later_recipe_is_found_before_the_first_runs(folder: Path) -> None:
    wrong = mergekits(None, "base", "first") | {"parameters": {"wieght": 1}}
    file = write(folder / "several.yaml", [mergekits("first", "base", "a"), wrong])
    with pytest.raises(UsageError, match=r"recipe 2: task_arithmetic does not use .* 'wieght'"):
        load_recipes(file, folder / "out")
