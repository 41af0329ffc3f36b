"""``--json``: each command that prints results or plans prints one JSON value, and no more."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from starmerge_models.cli import app
from starmerge_models.schemas import schema_of
from tests.calibration.tiny import store
from tests.conftest import MakeAdapter

Run = Callable[..., subprocess.CompletedProcess[str]]

WITHOUT = {"demo prepare", "demo list", "schema"}
"""Commands that print nothing but a path, or names, on a line each, or JSON in any case."""


@pytest.fixture
def printed(starmerge: Run, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs a command with ``--json`` and returns what it printed."""

    def run(*arguments: object) -> Any:
        finished = starmerge(*arguments, "--json", cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr == ""
        return json.loads(finished.stdout)

    return run


@pytest.fixture
def folder(tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> Path:
    (tmp_path / "base").symlink_to(tiny_base)
    make_adapter("a", seed=1), make_adapter("b", seed=2)
    return tmp_path


def _commands(command: Any, name: str = "") -> dict[str, Any]:
    if not hasattr(command, "commands"):
        return {name: command}
    return {
        full: found
        for key, own in command.commands.items()
        for full, found in _commands(own, f"{name} {key}".strip()).items()
    }


def test_every_command_that_prints_a_result_has_the_option() -> None:
    commands = _commands(typer.main.get_command(app))
    lacking = {
        name
        for name, command in commands.items()
        if not any("--json" in option.opts for option in command.params)
    }
    assert lacking == WITHOUT


def test_a_merge_and_its_plan(printed: Callable[..., Any], folder: Path) -> None:
    command = ["merge", "base", "a", "b", "-o", "out", "-m", "ties:k=30", "-w", "b=2"]
    plan = printed(*command, "--dry-run", "--threads", 1)
    assert plan["method"] == "ties"
    assert plan["parameters"]["k"] == 30
    assert [(model["name"], model["weight"], model["ranks"]) for model in plan["models"]] == [
        ("a", 1, [4]),
        ("b", 2, [4]),
    ]
    assert (plan["tensors_merged"], plan["passes_before"], plan["threads"]) == (4, 3, 1)
    assert not (folder / "out").exists()
    made = printed(*command)
    assert made["output"] == "out"
    assert made["is_new"]
    written = json.loads((folder / "out" / "merge_report.json").read_text())
    assert made["report"]["recipe"] == written["recipe"]
    assert "tensors" not in made["report"]


def test_the_plan_of_an_adapter_has_the_ranks_that_errors_cost(
    printed: Callable[..., Any], folder: Path
) -> None:
    plan = printed("merge", "--as", "adapter", "a", "b", "-o", "out", "-m", "average", "--dry-run")
    ranks = [cost["rank"] for cost in plan["ranks"]]
    assert ranks == sorted(ranks)
    assert ranks[-1] == 8
    assert plan["ranks"][-1]["error"] < 1e-6


def test_a_merge_made_of_merges(printed: Callable[..., Any], folder: Path) -> None:
    recipes = [
        {"base": "first", "models": ["b"], "method": "average"},
        {"name": "first", "base": "base", "models": ["a"], "method": "average"},
    ]
    (folder / "several.yaml").write_text(yaml.safe_dump_all(recipes))
    planned = printed("merge", "several.yaml", "-o", "out", "--dry-run")
    assert [step["name"] for step in planned["steps"]] == ["first"]
    assert planned["without_plan"] == ["first", None]
    made = printed("merge", "several.yaml", "-o", "out")
    assert [(step["name"], step["is_new"]) for step in made["steps"]] == [("first", True)]
    again = printed("merge", "several.yaml", "-o", "out", "--overwrite")
    assert [(step["name"], step["is_new"]) for step in again["steps"]] == [("first", False)]


NOISY = """
from dataclasses import dataclass
import starmerge_models as sm
print("the file is read")

@dataclass(frozen=True)
class Noisy(sm.Average):
    \"\"\"Take the mean, and talk.\"\"\"
    name = "noisy"

    def merge(self, deltas, tensor, survey):
        print("merging")
        return super().merge(deltas, tensor, survey)
"""


def test_what_a_method_prints_goes_to_standard_error(starmerge: Run, folder: Path) -> None:
    (folder / "noisy.py").write_text(NOISY)
    name = "noisy.py:Noisy"
    told = starmerge("methods", name, "--json", cwd=folder)
    assert [method["name"] for method in json.loads(told.stdout)] == ["noisy"]
    assert told.stderr == "the file is read\n"
    made = starmerge("merge", "base", "a", "b", "-m", name, "-o", "out", "--json", cwd=folder)
    assert json.loads(made.stdout)["output"] == "out"
    assert set(made.stderr.split("\n")) == {"the file is read", "merging", ""}
    logged = starmerge("methods", name, "--json", "--log", "json", cwd=folder)
    assert len(json.loads(logged.stdout)) == 1
    assert [json.loads(line)["event"] for line in logged.stderr.splitlines()].count("log") == 1


def test_names_of_files_and_texts_are_whole_whatever_the_encoding(
    starmerge: Run, folder: Path
) -> None:
    name = os.fsdecode(b"o\xff\xcf\x83")  # ends in σ, after a byte that is no UTF-8
    merge = ["merge", "base", "a", "b", "-o", name, "--json"]
    for made in (
        starmerge(*merge, cwd=folder),
        starmerge(
            *merge, "--overwrite", cwd=folder, env=os.environ | {"PYTHONIOENCODING": "ascii"}
        ),
    ):
        assert made.returncode == 0, made.stderr
        assert (folder / json.loads(made.stdout)["output"] / "merge_report.json").is_file()
    described = starmerge("schema", "task", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert json.loads(described.stdout) == schema_of("task")


def test_before_the_command_the_option_is_refused_with_its_place(starmerge: Run) -> None:
    refused = starmerge("--json", "methods")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--json is an option of a command: write it after the command's name." in refused.stderr


def test_lists(printed: Callable[..., Any], folder: Path) -> None:
    assert {"name": "demo/digits", "origin": None}.items() <= next(
        task for task in printed("tasks") if task["name"] == "demo/digits"
    ).items()
    assert printed("tasks", "digits")["name"] == "digits"
    assert "demo" in {suite["name"] for suite in printed("suite")}
    assert printed("suite", "demo")["name"] == "demo"
    assert "numbers" in {study["name"] for study in printed("study")}
    assert printed("study", "numbers", "--base", "base")["merges"] > 0
    assert {"star", "ties"} <= {method["name"] for method in printed("methods")}
    assert printed("inspect", "base", "a", "b")["models"]


def test_what_killed_runs_left(printed: Callable[..., Any], starmerge: Run, folder: Path) -> None:
    assert printed("clean", folder) == []
    (folder / ".out.partial-1234").mkdir()
    (folder / ".out.partial-1234" / "file").write_bytes(bytes(1000))
    (found,) = printed("clean", folder)
    assert found["bytes"] >= 1000
    assert (found["state"], found["deleted"]) == ("left over", False)
    refused = starmerge("clean", folder, "--delete", "--json")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    (gone,) = printed("clean", folder, "--delete", "--yes")
    assert gone["deleted"]
    assert not (folder / ".out.partial-1234").exists()


def test_commands_that_ask_a_model(printed: Callable[..., Any], tmp_path: Path) -> None:
    base = store("llama", tmp_path / "model")
    rows = "".join(f"w{n} w{n + 1},w{10 + n % 2}\n" for n in range(40))
    (tmp_path / "rows.csv").write_text(f"input,label\n{rows}")
    options = ("-t", "rows.csv", "--scorer", "rank")
    scored = printed("evaluate", base, *options, "--rows", 4)
    assert [score["task"] for score in scored["scores"]] == ["rows"]
    sizes = ("--sequences", 2, "--length", 4)
    measured = printed("calibrate", base, "-o", "metric.safetensors", *sizes)
    assert measured["path"] == "metric.safetensors"
    trained = printed("finetune", base, "-t", "rows.csv", "-o", "tuned", "--test-rows", 4)
    assert trained["task"] == "rows"
    assert len(trained["losses"]) == 4
