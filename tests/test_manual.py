"""Every block of code in the manual is run, or says why not and is checked as far as it can be.

A page's blocks run in their order in one folder, where the models and files that the page names lie
as tiny ones: commands by the real command line, Python in one namespace. Commands that ask models
get options to ask little (:data:`LESS`). Before a block, ``<!-- file: NAME -->`` says that the page
calls it a file, and ``<!-- not run: WHY -->`` that it is only checked: commands by the parser of
the command line.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from starmerge_models.calibration.run import calibrate
from starmerge_models.checkpoints.hashing import blake3_of
from starmerge_models.checkpoints.metric import MetricWriter
from starmerge_models.cli import app
from starmerge_models.evaluation.scoring.matching.matcher import MATCHERS
from starmerge_models.evaluation.scoring.metrics.registry import METRICS
from starmerge_models.evaluation.tasks.files import make_task
from starmerge_models.evaluation.tasks.suites import Suite
from starmerge_models.mergekit.schema import read_recipe
from starmerge_models.methods import METHODS
from starmerge_models.recipe import make_recipe
from starmerge_models.study.study_file import make_study
from tests.forks import Forks
from tests.manual import PAGES, ROOT, Block, blocks_of, calls_of, put
from tests.small_demo import TOKENS, shorten_tokenizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

LANGUAGES = {"bash", "python", "yaml", "json", "toml"}
"""Of what is run; ``text`` is what a command prints, or a drawing."""

LESS = {
    "calibrate": ["--sequences", "2", "--length", "8", "--rows", "2"],
    "choose": ["--rows", "8"],
    "evaluate": ["--rows", "2"],
    "finetune": ["--rows", "2"],
}
"""What commands are given that would take long."""

GIVEN = {"api.md": {"evaluate": lambda model: None}}
"""What a page's Python takes for granted."""

ONCE = {
    "choose": ("tutorial/your-tasks.md",),
    "evaluate": ("tutorial/your-tasks.md", "evaluation.md"),
    "--report": (),  # tests/study/page has each kind of page
}
"""Commands that take seconds even so, and the pages on which they are run; elsewhere checked."""

QUICKER = {"choose.md": ("rows=16", "rows=8"), "evaluation.md": ("range(150)", "range(2)")}
"""What of a page's Python would take long, and what is run in its place."""

COMMAND_LINE: Any = typer.main.get_command(app)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """Return a folder with tiny models: a base that can be asked, its adapters and fine-tunes."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    base = folder / "base"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(base)
    shorten_tokenizer(base / "tokenizer.json")
    for number in range(3):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.name_or_path = "base"
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
        )
        get_peft_model(model, settings).save_pretrained(folder / f"adapter-{number}")
        tuned = folder / f"finetune-{number}"
        shutil.copytree(base, tuned)
        tensors = load_file(base / "model.safetensors")
        noisy = {key: (t + 0.1 * torch.randn_like(t)) for key, t in tensors.items()}
        save_file(noisy, tuned / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_the_code_of_a_page_runs(
    page: str, models: Path, loaded: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [block for block in blocks_of(page) if block.language != "text"]
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _lay_out(folder, "".join(block.code for block in blocks), models)
    names: dict[str, Any] = dict(GIVEN.get(page, {}))
    for registry in (METHODS, METRICS, MATCHERS):  # what a page defines is for that page
        monkeypatch.setattr(registry, "_others", dict(registry._others))
    monkeypatch.setitem(calibrate.__kwdefaults__, "sequences", 2)
    monkeypatch.setitem(calibrate.__kwdefaults__, "length", 8)
    for block in blocks:
        assert block.language in LANGUAGES, f"{block}: the language {block.language!r}"
        if block.file is not None:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.code)
        if block.language == "bash":
            _run_commands(block, folder, loaded)
        elif block.language == "python":
            tree = ast.parse(block.code.replace(*QUICKER.get(page, ("", ""))))
            if block.not_run is None:
                exec(compile(tree, str(block), "exec"), names)
        else:
            _check_data(block)


def _lay_out(folder: Path, code: str, models: Path) -> None:
    """Put tiny models and files under the names that a page's code has for them."""
    for name in ("BASE", "base", "path/to/base", "org/base"):
        put(models / "base", folder / name)
    adapters = [*re.findall(r"\badapters/([\w-]+)", code), "a", "b", "c"]
    adapters += re.findall(r'find_task\("(\w+)"\)', code)
    for number, name in enumerate(dict.fromkeys(adapters)):
        place = f"adapters/{name}" if "adapters" in code else name
        put(models / f"adapter-{number % 3}", folder / place)
        put(models / f"adapter-{number % 3}", folder / name)
    for number, name in enumerate(("org/adapter", "org/math", "org/french", "org/german")):
        put(models / f"adapter-{number % 3}", folder / name)
    for number, name in enumerate(("org/tuned", "other", "fine-tune", "A", "B")):
        put(models / f"finetune-{number % 3}", folder / name)
    if re.search(r"(evaluate|inspect|push) [^\n]*\bmerged\b", code):
        put(models / "finetune-2", folder / "merged")
    if "--tokenizer" in code:
        for name in ("a", "b"):
            for part in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                put(models / "base" / part, folder / name / part)
    rows = [{"input": f"{n} + 1 =", "label": str(n + 1)} for n in range(40)]
    for name in ("rows.jsonl", "mine.jsonl", "sql.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.txt").write_text("One text.\n\nAnother one, which is longer.\n" * 20)
    (folder / "tickets.csv").write_text(
        "text,team\n" + "".join(f"Message {n}.,{'BT'[n % 2]}\n" for n in range(40))
    )
    (folder / "mail.csv").write_text((folder / "tickets.csv").read_text())
    recipe = {"base": "BASE", "models": ["a", "b"], "method": "star"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _write_metric(folder / "metric.safetensors", models / "base" / "model.safetensors")


def _write_metric(file: Path, weights: Path) -> None:
    shapes = {key: t.shape for key, t in load_file(weights).items() if "proj" in key}
    with MetricWriter(
        file,
        base=("base", {weights.name: blake3_of(weights)}),
        made_from={"kind": "texts"},
        tensors=list(shapes),
        tasks=("digits", "sql"),
    ) as writer:
        for task in (None, "digits", "sql"):
            for key, (_, n) in shapes.items():
                root = torch.eye(n) + 0.1
                writer.add(root, [key], side="columns", task=task, tokens=100)


def _run_commands(block: Block, folder: Path, loaded: Forks) -> None:
    for command, *arguments in calls_of(block, folder):
        if command == "pip":
            _check_installed(block, arguments)
        elif command == "python" and block.not_run is None:
            common = (ROOT / "benchmarks" / "common.py").read_text()
            script = (ROOT / arguments[0]).read_text() + common
            for option in (word for word in arguments if word.startswith("--")):
                assert option in script, f"{block}: {arguments[0]} has no {option}"
        elif command == "starmerge":
            name = _parse(block, arguments)
            where = [pages for word, pages in ONCE.items() if word in (name, *arguments)]
            if block.not_run is None and all(block.page in pages for pages in where):
                _run(block, name, arguments, folder, loaded)


def _parse(block: Block, arguments: list[str]) -> str:
    """Let the command line read arguments; return the command's name."""
    try:
        context = COMMAND_LINE.make_context("starmerge", list(arguments))
        rest = [*context._protected_args, *context.args]
        name, command, rest = COMMAND_LINE.resolve_command(context, rest)
        command.make_context(name, rest, parent=context)
    except Exception as error:
        said = getattr(error, "message", None) or repr(error)
        raise AssertionError(f"{block}: starmerge {' '.join(arguments)}: {said}") from error
    return str(name)


def _run(block: Block, name: str, arguments: list[str], folder: Path, loaded: Forks) -> None:
    outputs = {"-o", "--output", "--report"}
    for option, place in pairwise(arguments):
        if option in outputs:  # each line of a block stands for itself
            _delete(folder / place)
    less = LESS.get(name, [])
    ended = loaded.run([*arguments, *less], cwd=str(folder), env=dict(os.environ))
    assert ended.code == 0, f"{block}: starmerge {' '.join(arguments)}\n{ended.err[-2000:]}"


def _delete(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _check_installed(block: Block, arguments: list[str]) -> None:
    """Make sure that a distribution of ours that is installed has the extras it is asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in arguments[1:]:
        name, _, extras = text.rstrip("]").partition("[")
        if name == project["name"] and extras:
            known = set(project["optional-dependencies"])
            assert set(extras.split(",")) <= known, f"{block}: {text}"


def _check_data(block: Block) -> None:
    """Read YAML, JSON and TOML; what starmerge reads, by its own reader."""
    if block.language == "toml":
        tomllib.loads(block.code)
    elif block.language == "json":
        try:
            json.loads(block.code)
        except json.JSONDecodeError:
            assert all(json.loads(line) for line in block.code.splitlines()), str(block)
    else:
        documents = list(yaml.safe_load_all(block.code))
        for content in documents if block.not_run is None else []:
            _check_file(dict(content), block)


def _check_file(content: dict[str, Any], block: Block) -> None:
    """Let a recipe, a task, a suite or a study be read by its reader."""
    if "merge_method" in content:
        _, problems = read_recipe(content)
        assert not problems.found, f"{block}: {problems.found}"
    elif "prompt" in content or "kind" in content:
        make_task({"name": "it", **content}, where=str(block))
    elif "methods" in content:
        make_study({"name": "it", **content}, where=str(block))
    elif "tasks" in content:
        Suite.model_validate({"name": "it", **content})
    else:
        content.pop("name", None)
        make_recipe(content, where=str(block))
