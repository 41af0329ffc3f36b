"""The first hour of new users, who know the README alone, on the demo's models.

Each test types what somebody would who comes from another place: the README's own commands,
mergekit and PEFT, the paper, a cluster.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import starmerge_models as sm
from starmerge_models.demo_names import demo_folder

_README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

Type = Callable[[str], str]


@pytest.fixture
def typed(
    starmerge: Callable[..., subprocess.CompletedProcess[str]], smollm2: Path, tmp_path: Path
) -> Type:
    """Return a function that runs a command line in an empty folder and returns its output."""

    def run(line: str) -> str:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "starmerge"
        finished = starmerge(*arguments, cwd=tmp_path)
        assert finished.returncode == 0, f"{line}\n{finished.stderr}"
        return finished.stdout

    return run


def _block(title: str, language: str) -> str:
    """Return the first block of code of a section of the README."""
    section = _README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_the_commands_of_the_readme(typed: Type, tmp_path: Path) -> None:
    lines = [line for line in _block("The first hour", "bash").splitlines() if line.strip("# ")]
    commands = [line.replace("--rows 40", "--rows 4") for line in lines if line[0] != "#"]
    printed = {command.split()[1]: typed(command) for command in commands}
    assert Path(printed["demo"].strip()).is_dir()
    assert "clash" in printed["inspect"]
    assert "normalised average" in printed["evaluate"]
    assert "of rank 32" in printed["merge"]
    shown = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    PeftModel.from_pretrained(shown, tmp_path / "merged-lora")


@pytest.mark.skipif(
    _CHROMIUM is None, reason="no Chromium: apt-get install --no-install-recommends chromium"
)
def test_the_page_shows_in_a_browser_what_the_merge_kept(typed: Type, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    typed("starmerge merge demo:base demo:digits demo:past -m auto -o merged")
    typed(
        "starmerge evaluate demo:base demo:digits demo:past merged -t digits,past --rows 4 "
        "--scorer rank --report scores.html"
    )
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((tmp_path / "scores.html").as_uri())
        text = page.inner_text("body")
        browser.close()
    assert "merged" in text
    assert "Normalised average" in text or "normalised average" in text


def test_the_readme_from_python(smollm2: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    with_adapters = AutoModelForCausalLM.from_pretrained(smollm2)
    with_adapters = PeftModel.from_pretrained(with_adapters, demo_folder("demo:digits"), "a")
    with_adapters.load_adapter(demo_folder("demo:past"), "b")
    names = {"peft_model": with_adapters, "model": model, "tokens": torch.tensor([[1, 2, 3]])}
    code = _block("From Python", "python").replace("rows=8", "rows=2")
    exec(compile(code, "README.md", "exec"), names)
    assert "merged" in with_adapters.peft_config
    assert (tmp_path / "merged-chain" / "model.safetensors").is_file()


def test_from_mergekit_and_peft(typed: Type, smollm2: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "demo:base",
        "models": [
            {"model": f"demo:base+demo:{name}", "parameters": {"weight": 0.5}}
            for name in ("digits", "past")
        ],
        "dtype": "bfloat16",
    }
    (tmp_path / "mergekit.yml").write_text(yaml.safe_dump(recipe))
    typed("starmerge merge mergekit.yml -o from-mergekit")
    typed("starmerge merge demo:base demo:digits demo:past -m average -o ours")
    theirs, ours = (
        load_file(tmp_path / name / "model.safetensors") for name in ("from-mergekit", "ours")
    )
    assert theirs.keys() == ours.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name].float(), ours[name].float(), rtol=2**-6, atol=1e-4)

    typed("starmerge merge --as adapter demo:digits demo:past -m average -o adapter")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(smollm2), demo_folder("demo:digits"), "a"
    )
    model.load_adapter(demo_folder("demo:past"), "b")
    sm.merge_adapters(model, ["a", "b"], "average", name="ab")
    model.load_adapter(tmp_path / "adapter", "from_files")
    tokens = torch.tensor([[1, 2, 3, 4]])
    found = {}
    for name in ("ab", "from_files"):
        model.set_adapter(name)
        found[name] = model(tokens).logits
    torch.testing.assert_close(found["ab"], found["from_files"], rtol=1e-2, atol=1e-2)


def test_with_the_paper_in_hand(typed: Type, tmp_path: Path) -> None:
    assert "Truncat" in typed("starmerge methods star")
    assert "llama-3.2" in typed("starmerge suite")
    assert "In arXiv 2502.10339" in typed("starmerge study eta")
    typed("starmerge merge demo:base demo:digits demo:past -m star:eta=40 -o star")
    report = json.loads((tmp_path / "star" / "merge_report.json").read_text())
    kept = [task["rank"] for record in report["tensors"] for task in record["tasks"]]
    assert all(1 <= rank < 16 for rank in kept)
    typed(
        "starmerge evaluate demo:base demo:digits demo:past star -t digits,past --rows 4 "
        "--scorer rank -o scores"
    )
    results = sm.load_results(tmp_path / "scores")
    assert set(results.table.columns) == {"base", "digits", "past", "star"}


def test_on_a_cluster(typed: Type, tmp_path: Path) -> None:
    command = "starmerge merge demo:base demo:digits demo:past -m shares"
    plan = json.loads(typed(f"{command} -o cluster --dry-run --json"))
    assert plan["tensors_merged"] == 60
    typed(f"{command} -o cluster --executor ray --threads 2 --log json")
    typed(f"{command} -o here")
    cluster, here = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("cluster", "here")
    )
    assert cluster == here
    assert json.loads(typed("starmerge verify cluster --json"))["is_right"]
