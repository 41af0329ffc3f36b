"""The demo's models by name, wherever a model is named."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import starmerge_models as sm
from starmerge_models.checkpoints.references import name_of
from starmerge_models.checkpoints.source import check_named, resolve
from starmerge_models.demo.base_model import HUB_ID
from starmerge_models.demo_names import adapter_names
from starmerge_models.errors import UsageError
from starmerge_models.recipe_file import load_recipe, write_recipe
from starmerge_models.study.names import model_name
from starmerge_models_demo import ADAPTERS
from tests.conftest import MakeAdapter

_EXAMPLES = Path(__file__).parents[2] / "examples"
Starmerge = Callable[..., subprocess.CompletedProcess[str]]


def test_the_names_stand_for_the_base_and_the_adapters(smollm2: Path) -> None:
    assert resolve("demo:base").path == smollm2
    assert adapter_names() == [f"demo:{path.name}" for path in sorted(ADAPTERS.iterdir())]
    for name in adapter_names():
        source = resolve(name)
        assert source.path == ADAPTERS / name.removeprefix("demo:")
        assert str(source) == name
    check_named("demo:base", "demo:digits")
    assert model_name("demo:base") == smollm2.name


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("demo:digits", "digits"),
        ("demo:base+demo:digits", "base+digits"),
        ("demo:base[0:8],demo:base[4:12]", "base[0:8],base[4:12]"),
    ],
)
def test_a_model_of_a_merge_is_called_after_what_follows_the_colon(
    reference: str, name: str
) -> None:
    assert name_of(reference) == name


def test_unknown_names_are_refused_with_the_nearest_and_with_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'demo:digit'\. Did you mean demo:digits\?"):
        resolve("demo:digit")
    with pytest.raises(
        UsageError, match=r"has no model 'demo:adapters'\. It has demo:base, demo:c"
    ):
        check_named("demo:base", "demo:adapters")
    with pytest.raises(UsageError, match="demo:digitz"):
        sm.merge("demo:base", ["demo:digitz"], "average", output=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_such_a_name_is_written_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo:mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("./demo:mine").path == Path("demo:mine")
    with pytest.raises(UsageError, match=r"is written \./demo:mine"):
        resolve("demo:mine")


def test_paths_of_python_and_of_recipes_reach_such_a_folder(
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_adapter("demo:mine"), make_adapter("demo:digits"), make_adapter("other", seed=1)
    monkeypatch.chdir(tmp_path)
    for name in ("demo:mine", "demo:digits"):
        assert resolve(Path(name)).path == Path(name)
    with pytest.raises(UsageError, match=r"\./demo:gone does not exist"):
        resolve(Path("demo:gone"))
    vectors = sm.load_task_vectors(tiny_base, [Path("demo:mine"), "other"])
    assert list(vectors.names) == ["demo:mine", "other"]
    text = f"base: {tiny_base}\nmodels: [./demo:mine, demo:digits]\nmethod: average\n"
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "sub").mkdir()
    for folder, file in (
        (tmp_path, Path("recipe.yaml")),
        (tmp_path / "sub", Path("../recipe.yaml")),
    ):
        monkeypatch.chdir(folder)
        recipe = load_recipe(file)
        mine, digits = (resolve(entry.path).path for entry in recipe.models)
        assert Path(mine).samefile(tmp_path / "demo:mine")
        assert digits == ADAPTERS / "digits"
        write_recipe(recipe, Path("copy.yaml"))
        copied = [resolve(entry.path).path for entry in load_recipe(Path("copy.yaml")).models]
        assert Path(copied[0]).samefile(mine)
        assert copied[1] == digits


def test_a_base_that_is_not_prepared_is_refused_with_the_command(
    starmerge: Starmerge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["merge", "demo:base", "demo:digits", "-m", "average", "-o", tmp_path / "merged"]
    refused = starmerge(*arguments)
    assert refused.returncode == 2
    assert "Fetch it with: starmerge demo prepare" in refused.stderr
    assert not (tmp_path / "merged").exists()


def test_the_example_recipe_runs_as_it_stands_from_anywhere(
    smollm2: Path, starmerge: Starmerge, tmp_path: Path
) -> None:
    finished = starmerge("merge", _EXAMPLES / "star.yaml", "-o", "merged", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert [entry["reference"] for entry in report["inputs"]] == [
        "demo:base",
        "demo:digits",
        "demo:language",
        "demo:sentiment",
    ]
    verified = starmerge("verify", "merged", cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout


def test_a_recipe_keeps_the_names_when_it_is_written_elsewhere(
    smollm2: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(_EXAMPLES / "star.yaml")
    write_recipe(recipe, tmp_path / "copy.yaml")
    copy = load_recipe(tmp_path / "copy.yaml")
    assert copy == recipe
    assert (copy.base, [entry.name for entry in copy.models]) == (
        "demo:base",
        ["digits", "language", "sentiment"],
    )


def test_a_recipe_of_mergekit_names_them_and_the_base_is_that_of_the_adapters(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mergekit.yaml"
    file.write_text(
        "merge_method: linear\n"
        "models:\n"
        "  - {model: demo:digits, parameters: {weight: 1}}\n"
        "  - {model: demo:past, parameters: {weight: 1}}\n"
    )
    recipe = load_recipe(file)
    assert [entry.path for entry in recipe.models] == ["demo:digits", "demo:past"]
    assert recipe.base == HUB_ID
    file.write_text(
        "merge_method: linear\n"
        "models:\n"
        "  - {model: demo:base+demo:digits, parameters: {weight: 1}}\n"
        "base_model: demo:base\n"
    )
    recipe = load_recipe(file)
    assert (recipe.base, recipe.models[0].path) == ("demo:base", "demo:digits")


def test_the_adapters_are_listed_for_the_shell(starmerge: Starmerge) -> None:
    listed = starmerge("demo", "list")
    assert listed.stdout.split() == adapter_names()
