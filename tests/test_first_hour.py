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
from tests.forks import Forks

_README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

Type = Callable[[str], str]


@pytest.fixture
def typed(
    starmerge: Callable[..., subprocess.CompletedProcess[str]], smollm2: Path, tmp_path: Path
) -> Type:
    """Return a function that runs a command line in an empty folder and returns its output."""

    return lambda line: _ran(line, starmerge, cwd=tmp_path)


@pytest.fixture
def typed_small(
    starmerge: Callable[..., subprocess.CompletedProcess[str]], small_demo: Path, tmp_path: Path
) -> Type:
    """Return the same function, for which the demo's models have two layers."""
    return lambda line: _ran(line, starmerge, cwd=tmp_path, site=small_demo)


def _ran(
    line: str, starmerge: Callable[..., subprocess.CompletedProcess[str]], **options: Path
) -> str:
    program, *arguments = shlex.split(line, comments=True)
    assert program == "starmerge"
    finished = starmerge(*arguments, **options)
    assert finished.returncode == 0, f"{line}\n{finished.stderr}"
    return finished.stdout


def _block(title: str, language: str) -> str:
    """Return the first block of code of a section of the README."""
    section = _README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def first_hour(
    loaded: Forks, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """Run the README's commands on the demo's real models.

    Returns:
        Their folder, and what each printed.
    """
    folder = tmp_path_factory.mktemp("first-hour")
    printed = {}
    for line in _block("The first hour", "bash").replace("--rows 40", "--rows 2").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "starmerge"
            ended = loaded.run(words[1:], cwd=str(folder))
            assert ended.code == 0, f"{line}\n{ended.err}"
            printed[words[1]] = ended.out
    return folder, printed


def test_the_commands_of_the_readme(first_hour: tuple[Path, dict[str, str]]) -> None:
    folder, printed = first_hour
    assert Path(printed["demo"].strip()).is_dir()
    assert "clash" in printed["inspect"]
    assert "normalised average" in printed["evaluate"]
    assert "of rank 32" in printed["merge"]
    shown = AutoModelForCausalLM.from_pretrained(folder / "merged")
    PeftModel.from_pretrained(shown, folder / "merged-lora")


@pytest.mark.skipif(
    _CHROMIUM is None, reason="no Chromium: apt-get install --no-install-recommends chromium"
)
def test_the_page_shows_in_a_browser_what_the_merge_kept(
    first_hour: tuple[Path, dict[str, str]],
) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((first_hour[0] / "scores.html").as_uri())
        text = page.inner_text("body")
        browser.close()
    assert "merged" in text
    assert "Normalised average" in text or "normalised average" in text


def test_the_readme_from_python(small_demo: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(demo_folder("demo:base"))
    with_adapters = AutoModelForCausalLM.from_pretrained(demo_folder("demo:base"))
    with_adapters = PeftModel.from_pretrained(with_adapters, demo_folder("demo:digits"), "a")
    with_adapters.load_adapter(demo_folder("demo:past"), "b")
    names = {"peft_model": with_adapters, "model": model, "tokens": torch.tensor([[1, 2, 3]])}
    code = _block("From Python", "python").replace("rows=8", "rows=2")
    exec(compile(code, "README.md", "exec"), names)
    assert "merged" in with_adapters.peft_config
    assert (tmp_path / "merged-chain" / "model.safetensors").is_file()


def test_from_mergekit_and_peft(typed_small: Type, tmp_path: Path) -> None:
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
    typed_small("starmerge merge mergekit.yml -o from-mergekit")
    typed_small("starmerge merge demo:base demo:digits demo:past -m average -o ours")
    theirs, ours = (
        load_file(tmp_path / name / "model.safetensors") for name in ("from-mergekit", "ours")
    )
    assert theirs.keys() == ours.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name].float(), ours[name].float(), rtol=2**-6, atol=1e-4)

    typed_small("starmerge merge --as adapter demo:digits demo:past -m average -o adapter")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(demo_folder("demo:base")),
        demo_folder("demo:digits"),
        "a",
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


def test_with_the_paper_in_hand(typed_small: Type, tmp_path: Path) -> None:
    assert "Truncat" in typed_small("starmerge methods star")
    assert "llama-3.2" in typed_small("starmerge suite")
    assert "In arXiv 2502.10339" in typed_small("starmerge study eta")
    typed_small("starmerge merge demo:base demo:digits demo:past -m star:eta=40 -o star")
    report = json.loads((tmp_path / "star" / "merge_report.json").read_text())
    kept = [task["rank"] for record in report["tensors"] for task in record["tasks"]]
    assert all(1 <= rank < 16 for rank in kept)
    typed_small(
        "starmerge evaluate demo:base demo:digits demo:past star -t digits,past --rows 4 "
        "--scorer rank -o scores"
    )
    results = sm.load_results(tmp_path / "scores")
    assert set(results.table.columns) == {"base", "digits", "past", "star"}


def test_on_a_cluster(typed_small: Type, tmp_path: Path) -> None:
    command = "starmerge merge demo:base demo:digits demo:past -m shares"
    plan = json.loads(typed_small(f"{command} -o cluster --dry-run --json"))
    assert plan["tensors_merged"] == 4
    typed_small(f"{command} -o cluster --executor ray --threads 1 --log json")
    typed_small(f"{command} -o here")
    cluster, here = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("cluster", "here")
    )
    assert cluster == here
    assert json.loads(typed_small("starmerge verify cluster --json"))["is_right"]
