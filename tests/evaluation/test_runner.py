"""Whole evaluations: what shares the base, what is kept, what is compared."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import starmerge_models as sm
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation import model_groups
from starmerge_models.evaluation.cache import ScoreCache
from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.results import load_results, write_results
from starmerge_models.evaluation.runner import evaluate, prepare_tasks
from starmerge_models.evaluation.scoring.metrics import Prediction, Score, score
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.table import differences, markdown, notes, report
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.evaluation.tasks.sources import FileSource
from starmerge_models.evaluation.tasks.task import Task
from starmerge_models.study.figures import plot_scores
from tests.evaluation.tiny_world import World

FEW = Settings("rank", rows=12)


def test_scores_base_adapters_and_merges_on_the_same_rows(world: World, tmp_path: Path) -> None:
    merged = sm.merge(world.base, world.adapters, output=tmp_path / "merged").path
    result = evaluate(
        world.base,
        world.adapters | {"merged": merged, "copy": world.adapters["one"]},
        world.tasks,
        FEW,
    )
    assert list(result.scores) == ["base", "one", "two", "merged", "copy"]
    assert list(result.scores["one"]) == ["one"]
    assert list(result.scores["merged"]) == ["one", "two"]
    assert result.tuned["one"].predictions == result.scores["copy"]["one"].predictions
    assert result.tuned["one"].value > result.scores["base"]["one"].value
    average = result.normalised("merged")
    assert average is not None
    expected = (
        sum(result.scores["merged"][t].value / result.tuned[t].value for t in world.adapters) / 2
    )
    assert average.value == pytest.approx(expected)

    records = result.to_records()
    assert len(records) == 2 + 1 + 1 + 2 + 2
    assert all(record["n"] == 12 for record in records)
    content = result.to_json()
    assert [entry["model"] for entry in content["normalised_averages"]] == [
        "base",
        "merged",
        "copy",
    ]
    assert {entry["task"] for entry in content["differences_by_task"]} == set(world.adapters)

    table = markdown(result).splitlines()
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == [
        "task",
        "n",
        "base",
        "fine-tuned",
        "merged",
        "copy",
    ]
    assert len({len(line) for line in table}) == 1
    assert f"{average.value:.3f}" in table[-1]
    (sentence,) = differences(result)
    assert sentence.startswith("Normalised average: copy − merged: ")
    plot_scores(result, tmp_path / "chart.png", title="t")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")

    write_results(tmp_path / "results", result, report(result))
    scores, predictions = load_results(tmp_path / "results")
    assert len(scores) == len(records)
    assert len(predictions) == 12 * len(records)
    means = predictions.groupby(["model", "task"]).credit.mean()
    for record in records:
        assert means[record["model"], record["task"]] == pytest.approx(record["score"])


def test_an_update_in_memory_scores_as_its_files_do_and_leaves_the_base(
    shallow: Path, shallow_adapters: dict[str, Path], tmp_path: Path
) -> None:
    past = shallow_adapters["past"]
    adapters = {"past": past, "plural": shallow_adapters["plural"]}
    files = sm.merge(shallow, adapters, output=tmp_path / "merged").path
    update = sm.load_task_vectors(shallow, adapters).merge(sm.Star())
    models = {"past": past, "files": files, "memory": update}
    result = evaluate(shallow, models, [find_task("past")], Settings(rows=8))
    alone = evaluate(shallow, {}, [find_task("past")], Settings(rows=8))
    assert result.scores["memory"] == result.scores["files"]
    assert result.scores["memory"] != result.scores["base"] == alone.scores["base"]


def test_what_is_kept_is_not_asked_again_and_never_stale(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ScoreCache(tmp_path / "cache")
    adapter = shutil.copytree(world.adapters["one"], tmp_path / "one")

    def run(rows: int = 6, models: dict[str, Path] | None = None) -> object:
        settings = Settings("rank", rows=rows)
        asked = models or {"one": adapter}
        return evaluate(world.base, asked, world.tasks[:1], settings, cache=cache).scores

    loaded = []
    load = model_groups.load_model
    monkeypatch.setattr(
        model_groups,
        "load_model",
        lambda path, **options: loaded.append(path) or load(path, **options),
    )
    fresh = run()
    assert loaded == [world.base]
    assert run() == fresh
    elsewhere = shutil.copytree(adapter, tmp_path / "elsewhere")
    assert run(models={"one": elsewhere}) == fresh
    assert len(loaded) == 1, "the same content was asked again"

    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in weights if ".lora_B." in key)
    weights[name] = weights[name] * 1.01
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    run()
    assert len(loaded) == 2, "a changed weight was not asked"
    config = json.loads((elsewhere / "adapter_config.json").read_text())
    (elsewhere / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    changed = run(models={"one": elsewhere})
    assert len(loaded) == 3, "a changed scale was not asked"
    assert changed != fresh
    run(rows=7)
    assert len(loaded) == 4, "other rows were not asked"


def test_updates_in_memory_are_kept_by_their_content(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ScoreCache(tmp_path / "cache")
    loaded = []
    load = model_groups.load_model
    monkeypatch.setattr(
        model_groups,
        "load_model",
        lambda path, **options: loaded.append(path) or load(path, **options),
    )

    def run(
        method: sm.Method, base: Path = world.base, **options: Any
    ) -> tuple[Mapping[str, Score], bool]:
        """Merge from the files anew; return the scores, and whether a model was loaded."""
        before = len(loaded)
        update = sm.load_task_vectors(base, world.adapters).merge(method, **options)
        settings = Settings("rank", rows=20)
        result = evaluate(base, {"m": update}, world.tasks, settings, cache=cache)
        return result.scores["m"], len(loaded) > before

    fresh, asked = run(sm.Star())
    assert asked
    assert run(sm.Star()) == (fresh, False)
    copy = shutil.copytree(world.base, tmp_path / "copy")
    assert run(sm.Star(), base=copy) == (fresh, False)
    assert run(sm.Star(), threads=2) == (fresh, False)
    different = []
    for method, options in (
        (sm.Star(eta=60), {}),
        (sm.Star(), {"weights": [1, 4]}),
        (sm.Star(), {"models": ["two", "one"]}),
        (sm.Star(), {"models": ["one"]}),
        (sm.TaskArithmetic(alpha=-1), {}),
    ):
        again, asked = run(method, **options)  # type: ignore[arg-type]
        assert asked, (method, options)
        assert run(method, **options) == (again, False)  # type: ignore[arg-type]
        different.append(again != fresh)
    assert different[2:] == [False, True, True], "the order of models changes rounding at most"
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert run(sm.Star(), base=copy)[1], "another base was not asked"


def test_without_fine_tunes_there_is_no_normalised_average(world: World) -> None:
    result = evaluate(world.base, {"x": world.adapters["one"]}, world.tasks[1:], FEW)
    assert result.normalised("x") is None
    assert "normalised" not in markdown(result)
    assert differences(result) == []


def test_a_reader_is_told_of_short_contexts_reference_matching_and_constant_answers(
    shallow: Path, tmp_path: Path
) -> None:
    rows = [{"text": "word " * 9000, "label": n} for n in range(3)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task(
        name="long",
        source=FileSource(file=file),
        prompt="{text}",
        match="number",
        metric="spearman",
        max_new_tokens=2,
    )
    folder = tmp_path / "short"
    shutil.copytree(shallow, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 64}))
    result = evaluate(folder, {}, [task], Settings(mode="reference"))
    said = "\n".join(notes(result))
    assert "Matching: reference" in said
    assert "base, long: 3 of 3 prompts are longer than the model's context" in said
    assert "the spearman of identical answers is undefined" in said
    assert "| long (spearman) | 3 | –" in markdown(result)


def test_wrong_calls_are_refused_before_a_model_is_loaded(world: World, tmp_path: Path) -> None:
    task, adapter = world.tasks[0], world.adapters["one"]
    for bound in ("base", "fine-tuned"):
        with pytest.raises(UsageError, match=f"A model is called '{bound}'"):
            evaluate(tmp_path, {bound: adapter}, [task], FEW)
    with pytest.raises(UsageError, match="Two tasks are called 'one'"):
        evaluate(tmp_path, {}, [task, task], FEW)
    with pytest.raises(UsageError, match="gone does not exist"):
        evaluate(tmp_path, {"x": "gone"}, [task], FEW)
    with pytest.raises(UsageError, match="'rnak' is unknown. Did you mean 'rank'"):
        Settings("rnak")
    with pytest.raises(UsageError, match="strict or reference"):
        Settings(mode="loose")  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, -1, 2.5, "4"])
def test_a_number_of_rows_is_a_whole_one_from_one(number: Any) -> None:
    for name in ("rows", "batch_size"):
        with pytest.raises(UsageError, match=f"{name} is {number!r}. Give a whole number, 1"):
            Settings(**{name: number})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": "language"}, "The tasks are 'language'. Give a list"),
        ({"tasks": None}, "The tasks are None. Give a list"),
        ({"tasks": []}, "There is no task. Give at least one"),
        ({"tasks": [None]}, "A NoneType stands where a task is wanted"),
        ({"base": None}, "A NoneType stands where a model's folder"),
        ({"models": {"x": None}}, "A NoneType stands where a model's folder"),
        ({"models": {1: "x"}}, "A model is called 1. Give a text"),
        ({"settings": {"rows": 4}}, "The settings are {'rows': 4}. Give an object"),
    ],
)
def test_arguments_of_other_types_are_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(**{"base": tmp_path, "models": [], "tasks": ["language"]} | arguments)


def test_a_task_may_be_the_path_of_a_file(tmp_path: Path) -> None:
    rows = "".join(f"w{n} w{n + 1},w{10 + n % 2}\n" for n in range(40))
    (tmp_path / "rows.csv").write_text(f"input,label\n{rows}")
    prepared = prepare_tasks([tmp_path / "rows.csv"], Settings("rank", rows=4))
    assert [(task.name, task.size) for task in prepared.values()] == [("rows", 4)]


def test_a_model_of_nan_is_named_with_its_task(
    shallow: Path, shallow_adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = shutil.copytree(shallow_adapters["past"], tmp_path / "broken")
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in weights if ".lora_B." in key)
    weights[name] = weights[name] * float("nan")
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StarmergeError, match="Model broken, task past: .*NaN or infinite"):
        evaluate(shallow, {"broken": adapter}, [find_task("past")], Settings(rows=2))


def test_what_is_rewritten_while_it_is_asked_is_not_kept(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ScoreCache(tmp_path / "cache")
    base = shutil.copytree(world.base, tmp_path / "base")
    load = model_groups.load_model

    def load_and_rewrite(path: Path, **options: object) -> object:
        loaded = load(path, **options)
        (base / "generation_config.json").unlink()
        return loaded

    def run() -> int:
        evaluate(base, {}, world.tasks[:1], FEW, cache=cache)
        return len(list(cache.folder.glob("*.jsonl")))

    with monkeypatch.context() as patch:
        patch.setattr(model_groups, "load_model", load_and_rewrite)
        assert run() == 0
    assert run() == 1


def test_names_do_not_break_the_table() -> None:
    scores = {"a|b\nc": score([Prediction("1", "x", "x", "x", 1.0)], "accuracy")}
    table = markdown(Evaluation("generate", "strict", {"base": scores}, {})).splitlines()
    assert len(table) == 3
    assert "a\\|b c" in table[2]
