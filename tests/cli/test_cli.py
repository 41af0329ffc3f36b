"""The command line as its users meet it: a process, its output, its exit code."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from starmerge_models import open_metric
from tests.calibration.tiny import store
from tests.conftest import MakeAdapter, MakeFinetune, MakeMetric

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_merges_from_arguments_and_from_the_same_recipe(
    starmerge: Run, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    one, two = make_adapter("one", seed=1), make_adapter("two", seed=2)
    out, again = tmp_path / "out", tmp_path / "again"
    finished = starmerge("merge", tiny_base, one, f"x={two}", "-o", out, "-p", "eta=55")
    assert finished.returncode == 0, finished.stderr
    assert "star: 4 tensors merged, 17 left as they are; mean rank kept" in finished.stdout
    assert AutoModelForCausalLM.from_pretrained(out)

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {tiny_base}\nmodels:\n  - one\n  - {{path: two, name: x}}\n"
        "method: star\nparameters: {eta: 55}\n"
    )
    finished = starmerge("merge", recipe, "-o", again, "--threads", "2", "--memory", "1MB")
    assert finished.returncode == 0, finished.stderr
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, again)]
    assert weights[0] == weights[1]


def test_chains_and_weights_from_the_command_line(
    starmerge: Run, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    one, two = make_adapter("one", seed=1), make_adapter("two", seed=2)
    out, again = tmp_path / "out", tmp_path / "again"
    options = ["-m", "star+ties", "-p", "eta=[55, 80]", "-p", "ties.k=30", "-w", "two=0.5"]
    finished = starmerge("merge", tiny_base, one, two, "-o", out, *options)
    assert finished.returncode == 0, finished.stderr
    assert "star+ties: 4 tensors merged" in finished.stdout
    recipe = json.loads((out / "merge_report.json").read_text())["recipe"]
    assert [model["weight"] for model in recipe["models"]] == [1.0, 0.5]
    assert recipe["parameters"]["star.eta"] == [55, 80]
    assert recipe["parameters"]["ties.k"] == 30

    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    finished = starmerge("merge", tmp_path / "recipe.yaml", "-o", again)
    assert finished.returncode == 0, finished.stderr
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, again)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("command", [[], ["demo"]])
def test_without_words_the_help_is_printed_once(starmerge: Run, command: list[str]) -> None:
    finished = starmerge(*command)
    assert finished.returncode == 2
    assert finished.stdout.count("Usage: starmerge") == 1
    assert not finished.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-w", "three=1"], "no model is called 'three'"),
        (["-w", "one=heavy"], "'heavy' is not a number"),
        (["-w", "one=1", "-w", "one=2"], "--weight one is given twice"),
        (["-w", "one=1", "-w", "two=-1"], "The weights sum to zero, and average divides"),
        (["-w", "one=inf"], "weight: Input should be a finite number"),
        (["-p", "eta=40", "-p", "eta=50"], "-p eta is given twice"),
        (["-p", "eta=[40]"], "eta has 1 numbers for 2 models"),
        (["-m", "ties+star"], "the order is transforms, one merge, post-steps"),
        (["-m", "trim+ties", "-p", "k=10"], "Say trim.k or ties.k"),
        (["--memory", "much"], "memory is 'much'. Give bytes, or a number with a unit: 4GB"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_chains_and_weights_that_do_not_fit_are_refused(
    options: list[str],
    message: str,
    starmerge: Run,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    one, two = make_adapter("one", seed=1), make_adapter("two", seed=2)
    finished = starmerge("merge", tiny_base, one, two, "-o", tmp_path / "out", *options)
    assert finished.returncode == 2
    assert message in " ".join(finished.stderr.split())
    assert not (tmp_path / "out").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(
    starmerge: Run,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    finished = starmerge(
        "merge",
        tiny_base,
        make_adapter("a"),
        make_finetune("b"),
        "-o",
        out,
        "--dry-run",
        "--threads",
        "3",
    )
    assert finished.returncode == 0, finished.stderr
    for words in ("LoRA adapter", "full fine-tune", "21 merged", "Read:", "write:", "threads: 3"):
        assert words in finished.stdout
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["merge", "{base}", "{adapter}", "-o", "{out}", "-m", "starr"], 2, "Did you mean 'star'"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "-p", "eat=3"], 2, "Did you mean 'eta'"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "-p", "eta=0"], 2, "greater than 0"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "-p", "eta"], 2, "KEY=VALUE"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--dtype", "int4"], 2, "dtype"),
        (["merge", "{base}", "{adapter}", "{adapter}", "-o", "{out}"], 2, "two models are called"),
        (["merge", "{base}", "-o", "{out}"], 2, "no model to merge"),
        (["merge", "{base}", "gone", "-o", "{out}"], 2, "gone does not exist"),
        (["merge", "{base}", "{adapter}", "-o", "{base}"], 2, "--overwrite"),
        (["merge", "{base}", "{broken}", "-o", "{out}"], 1, "is not a complete safetensors file"),
        (["merge", "recipe.yaml", "x", "-o", "{out}"], 2, "recipe says everything itself"),
        (["merge", "recipe.yaml", "-o", "{out}"], 2, "recipe.yaml does not exist"),
        (["methods", "starr"], 2, "Did you mean 'star'"),
        (["evaluate", "{base}", "--tasks", "digit"], 2, "Did you mean 'digits'"),
        (["evaluate", "{base}", "--tasks", "digits", "--scorer", "x"], 2, "generate, rank"),
        (["evaluate", "{base}", "-t", "digits", "--matching", "x"], 2, "strict or reference"),
        (["evaluate", "{base}", "-t", "digits", "--dtype", "int4"], 2, "bfloat16"),
        (["evaluate", "{base}", "-t", "digits", "--backend", "x"], 2, "transformers or vllm"),
        (["evaluate", "{base}", "-t", "digits", "--predictions", "csv"], 2, "parquet or jsonl"),
        (["evaluate", "{base}", "-t", "digits", "-o", "{adapter}"], 2, "is not empty"),
        (["evaluate", "{base}", "-t", "digits", "--data", "past=x.csv"], 2, "there is no file"),
        (["evaluate", "{base}", "-t", "digits", "--data", "rows"], 2, "write NAME=PATH"),
        (["evaluate", "{base}", "-t", "flan-t5/qqp"], 2, "--data qqp=rows.jsonl"),
        (["evaluate", "{base}", "-t", "digits", "--prompts", "x"], 2, "fusion-bench"),
        (["suite", "flan-t5", "-o", "{out}", "--prompts", "x"], 2, "fusion-bench"),
        (
            ["calibrate", "{base}", "-o", "{out}", "--texts", "gone.txt"],
            2,
            "gone.txt does not exist",
        ),
        (["calibrate", "{base}", "-o", "{out}", "--dtype", "int4"], 2, "bfloat16"),
        (["calibrate", "{base}", "-o", "{out}", "--prompts", "digit"], 2, "Did you mean 'digits'"),
        (["calibrate", "{base}", "-o", "{out}", "--prompts", "a="], 2, "write TASK or TASK=ROWS"),
        (["calibrate", "{base}", "-o", "{adapter}"], 2, "is a folder or a link"),
        (["calibrate", "{adapter}", "-o", "{out}"], 2, "is an adapter"),
        (["choose", "{base}", "{adapter}", "-t", "digits", "-m", "star"], 2, "two candidates"),
        (["choose", "{base}", "{adapter}", "-t", "digits", "-o", "{out}"], 2, "ends in .yaml"),
        (["suite", "flan"], 2, "flan-t5"),
        (["evaluate", "{base}", "-t", "digits", "--columns", "text"], 2, "write NAME=COLUMN"),
        (["evaluate", "{base}", "-t", "digits", "--columns", "input=a"], 2, "file of bare rows"),
        (["evaluate", "{base}", "-t", "digits", "--all-rows"], 2, "Leave the option out"),
        (["finetune", "{base}", "-t", "a", "-t", "b", "-o", "{out}"], 2, "names 2 tasks"),
        (["tasks", "flan-t5/qqq"], 2, "Did you mean 'flan-t5/qqp'"),
        (["finetune", "{base}", "--task", "digits", "-o", "{base}"], 2, "not empty"),
        (["demo", "run", "--scorer", "x"], 2, "generate, rank"),
        (["merge", "", "{adapter}", "-o", "{out}"], 2, "path is empty"),
        (["merge", "{base}", "={adapter}", "-o", "{out}"], 2, "name"),
        (["merge", "{base}", "{adapter}", "-o", "/"], 2, "root of the file system"),
        (["nonsense"], 2, "No such command"),
        (["merge", "a", "b", "-m", "star", "-m", "ties"], 2, "Write a chain as one: -m star+ties"),
        (["demo", "run", "--rows", "3", "--rows", "4"], 2, "--rows is given 2 times"),
        (["--log", "json", "merge", "a", "b", "--log", "text"], 2, "--log is given 2 times"),
        (["inspect", "{base}"], 2, "See `starmerge inspect --help`"),
        (["merge", "{base}", "{adapter}", "-m", "STAR", "-o", "{out}"], 2, "Did you mean 'star'?"),
        (["merge", "{base}", "{adapter}", "-m", "dare_ties", "-o", "{out}"], 2, "'dare+ties'?"),
        (["methods", "star+star"], 2, "star stands there twice"),
        (["evaluate", "nowhere", "-t", "x"], 2, "nowhere does not exist"),
        (["choose", "{base}", "./x", "{adapter}", "-t", "x"], 2, "./x does not exist"),
        (["finetune", "nowhere", "-t", "x", "-o", "{out}"], 2, "nowhere does not exist"),
        (["verify", "nowhere"], 2, "nowhere does not exist"),
        (["evaluate", "{base}", "./x", "-t", "x"], 2, "./x does not exist"),
        (["evaluate", "{base}", "-t", "x"], 2, "`starmerge tasks` lists the"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_are_one_line_with_the_right_code(
    starmerge: Run,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    adapter = make_adapter("adapter")
    broken = shutil.copytree(adapter, tmp_path / "broken")
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    places = {"base": tiny_base, "adapter": adapter, "broken": broken, "out": tmp_path / "out"}
    finished = starmerge(*(text.format(**places) for text in arguments), cwd=tmp_path)
    assert finished.returncode == code
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    if "json" not in arguments:
        assert finished.stderr.startswith("Error: ")
    assert finished.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_calibrates_says_what_it_will_do_and_what_it_did(starmerge: Run, tmp_path: Path) -> None:
    base = store("llama", tmp_path / "base")
    (tmp_path / "sql.jsonl").write_text('{"input": "w5 w6"}\n{"input": "w7"}\n')
    options = ["--prompts", "sql=sql.jsonl", "--prompts", "past=sql.jsonl", "--sequences", "4"]
    options += ["--length", "9", "--seed", "3", "--memory", "10kB", "--device", "cpu"]
    command = ["calibrate", base, "-o", "m.safetensors", *options]
    finished = starmerge(*command, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    for words in (
        "Text: 4 sequences that the base writes, of 9 tokens after 1",
        "Task sql: 2 prompts, 3 tokens",
        "Modules: 15, with 9 inputs",
        "passes over the text: 9",
        "File: 0.1 MB at most",
        "27 moments of 15 tensors, from 40 tokens, and of the tasks sql, past",
        "Metric: m.safetensors",
    ):
        assert words in finished.stdout, finished.stdout
    assert open_metric(tmp_path / "m.safetensors").tasks == ("sql", "past")
    finished = starmerge(*command, cwd=tmp_path)
    assert finished.returncode == 2
    assert "m.safetensors exists" in finished.stderr


def test_debug_shows_where_an_error_comes_from(starmerge: Run, tmp_path: Path) -> None:
    finished = starmerge("--debug", "merge", "gone", "gone", "-o", tmp_path / "out")
    assert "Traceback" in finished.stderr
    assert "UsageError: gone does not exist" in finished.stderr


def test_lists_methods_for_people_and_programs(starmerge: Run) -> None:
    assert "task_arithmetic" in starmerge("methods").stdout
    assert "arXiv 2502.10339" in starmerge("methods", "star").stdout
    described = json.loads(starmerge("methods", "--json").stdout)
    assert {method["name"] for method in described} >= {"star", "average", "task_arithmetic"}
    (star,) = (method for method in described if method["name"] == "star")
    assert star["parameters"][0]["name"] == "eta"
    assert star["parameters"][0]["default"] == 40


def test_lists_tasks_and_suites_and_shows_a_task_as_its_file(starmerge: Run) -> None:
    listed = starmerge("tasks").stdout
    assert all(f"{suite}/" in listed for suite in ("demo", "flan-t5", "llama-3.2", "mistral-nli"))
    shown = yaml.safe_load(starmerge("tasks", "llama-3.2/cb").stdout)
    assert shown["labels"] == {"0": ["yes"], "1": ["no"], "2": ["maybe"]}
    assert "mistralai/Mistral-7B-Instruct-v0.2" in starmerge("suite").stdout
    assert "Lots-of-LoRAs/Mistral-7B-Instruct" in starmerge("suite", "mistral-nli").stdout


def test_tasks_add_up_and_bare_rows_may_have_columns_of_other_names(
    starmerge: Run, tmp_path: Path
) -> None:
    base = store("llama", tmp_path / "base")
    rows = [f"w{n} w{n + 1},w{10 + n % 2}" for n in range(40)]
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,kind", *rows]) + "\n")
    finished = starmerge(
        *["evaluate", base, "-t", "a.csv,b.csv", "-t", "c.csv", "--columns"],
        *["input=text,label=kind", "--all-rows", "--scorer", "rank", "--flat", "R", "-o", "out"],
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert [(score["task"], score["n"]) for score in scores] == [("a", 40), ("b", 40), ("c", 40)]
    flat = json.loads((tmp_path / "R" / "a_b_c" / "pretrained.json").read_text())
    assert flat == {score["task"]: round(score["score"], 4) for score in scores}
    lacking = starmerge("evaluate", base, "-t", "a.csv", cwd=tmp_path)
    assert lacking.returncode == 2
    assert "--columns input=text,label=kind" in lacking.stderr


def test_every_command_explains_itself(starmerge: Run) -> None:
    top = starmerge("--help")
    assert top.returncode == 0
    commands = ["merge", "inspect", "calibrate", "evaluate", "choose", "suite", "finetune"]
    commands += ["methods", "tasks"]
    for command in [*commands, "demo"]:
        assert command in top.stdout
        assert starmerge(command, "--help").returncode == 0


def test_takes_models_from_the_hub_cache_by_name_and_revision(
    starmerge: Run,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Hub's own client, offline, on a cache laid out as it lays it out."""
    adapter = make_adapter("adapter")
    cache = tmp_path / "hub"
    for name, folder, revision in (
        ("tests/tiny", tiny_base, "main"),
        ("someone/adapter", adapter, "v2"),
    ):
        repository = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / "abc123")
        (repository / "refs").mkdir()
        (repository / "refs" / revision).write_text("abc123")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    finished = starmerge("merge", "tests/tiny", "someone/adapter@v2", "-o", out)
    assert finished.returncode == 0, finished.stderr
    report = json.loads((out / "merge_report.json").read_text())
    assert [entry["hub_id"] for entry in report["inputs"]] == ["tests/tiny", "someone/adapter"]
    assert {entry["revision"] for entry in report["inputs"]} == {"abc123"}
    card = (out / "README.md").read_text()
    assert "base_model:\n- tests/tiny\n- someone/adapter" in card

    finished = starmerge("merge", "tests/tiny", "someone/adapter@v9", "-o", tmp_path / "x")
    assert finished.returncode == 1
    assert "someone/adapter" in finished.stderr
    finished = starmerge("merge", "someone/gone", "tests/tiny", "-o", tmp_path / "x")
    assert finished.returncode == 1
    assert "neither a folder here nor in the Hub's cache" in finished.stderr


def test_a_disk_that_fails_in_the_middle_loses_nothing(
    starmerge: Run, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """The shell lets no file grow over 50 KB; the merged weights have 75 KB."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "merge_report.json").write_text("kept")
    merge = ["merge", str(tiny_base), str(make_adapter("adapter"))]
    command = [sys.executable, "-m", "starmerge_models", *merge, "-o", str(out), "--overwrite"]
    script = f"ulimit -f 50; {shlex.join(command)}"
    finished = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert finished.returncode == 1
    assert f"{out} was not made: [Errno 27]" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert (out / "merge_report.json").read_text() == "kept"
    # What was made is kept for the next run, which has the room.
    (partial,) = tmp_path.glob(".out.partial-*")
    assert str(partial) in finished.stderr
    again = starmerge(*merge, "-o", tmp_path / "new")
    assert again.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "adapter", "new", partial.name}


def test_merges_with_a_metric(
    starmerge: Run,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_metric: MakeMetric,
    tmp_path: Path,
) -> None:
    one, two, out = make_adapter("one", seed=1), make_adapter("two", seed=2), tmp_path / "out"
    metric = make_metric(tasks=["one", "two", "three"])
    command = ("merge", tiny_base, one, two, "-o", out, "--metric", metric)
    planned = starmerge(*command, "-m", "regmean", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    told = " ".join(planned.stdout.split())
    assert "merged in the tasks' own inputs" in told
    assert "Note: its prompts of three are of no model." in told
    assert not out.exists()
    done = starmerge(*command, "-m", "tsv_m")
    assert done.returncode == 0, done.stderr
    assert "merged in whitened inputs (metric.safetensors)" in done.stdout
    refused = starmerge(*command, "-m", "ties", "--overwrite")
    assert refused.returncode == 2
    assert "ties has no use for a metric" in refused.stderr
    recipe = starmerge("merge", tmp_path / "r.yaml", "-o", out, "--metric", metric)
    assert recipe.returncode == 2
    assert "--metric" in recipe.stderr


@pytest.mark.parametrize("command", ["merge", "verify", "choose"])
def test_help_breaks_its_lines_where_the_terminal_ends(
    starmerge: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = starmerge(command, "--help").stdout.partition("╭")[0]
    lines = [line.strip() for line in printed.splitlines()]
    paragraphs = [list(part) for is_text, part in groupby(lines, bool) if is_text]
    assert any(len(part) > 2 for part in paragraphs)
    for part in paragraphs:
        for line, following in pairwise(part):
            assert len(f" {line} {following.split()[0]} ") > 80


def test_a_chain_is_explained_method_by_method(starmerge: Run) -> None:
    printed = starmerge("methods", "star+ties").stdout
    assert printed.startswith("star+ties: a chain of star (transform), then ties (merge)\n")
    for name in ("star", "ties"):
        assert starmerge("methods", name).stdout.strip() in printed
    both = json.loads(starmerge("methods", "star+ties", "--json").stdout)
    assert [method["name"] for method in both] == ["star", "ties"]


def test_what_may_be_repeated_still_is(starmerge: Run, tmp_path: Path) -> None:
    """Parameters, tasks and switches stand as often as they are wanted."""
    planned = starmerge(
        "merge", tmp_path, tmp_path, "-p", "eta=3", "-p", "rank=3", "--overwrite", "--overwrite"
    )
    assert "is given" not in planned.stderr
