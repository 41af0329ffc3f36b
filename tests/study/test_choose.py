"""Choosing a merge: real races of a tiny model, whose tasks are what its adapters answer."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ResNetConfig, ResNetForImageClassification

import starmerge_models as sm
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation import model_groups, prepared_tasks
from starmerge_models.evaluation.cache import ScoreCache
from starmerge_models.evaluation.prepared_tasks import prepare_for_selection
from starmerge_models.evaluation.runner import evaluate
from starmerge_models.evaluation.scoring.comparison import Difference, Interval
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks.images import ArraySource, ImageTask
from starmerge_models.evaluation.tasks.lm_eval import load_tasks
from starmerge_models.evaluation.tasks.sources import FileSource, Sample
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.plan import make_plan
from starmerge_models.recipe import make_recipe
from starmerge_models.recipe_file import load_recipe, write_recipe
from starmerge_models.study.candidates import candidate_name, default_candidates, named_candidates
from starmerge_models.study.choose import Choice, choose
from starmerge_models.study.race import Outcome, Standing
from tests.evaluation.tiny_world import ALL, World

RANK = Settings("rank", rows=16)
FEW = ["average", sm.TaskArithmetic(alpha=-1), "star"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the rows of each task that is asked; a model that is loaded counts as 0 rows."""
    counts: list[int] = []
    run, load = prepared_tasks._PreparedText.run, model_groups.load_model
    monkeypatch.setattr(
        prepared_tasks._PreparedText,
        "run",
        lambda self, *rest: counts.append(self.size) or run(self, *rest),
    )
    monkeypatch.setattr(
        model_groups,
        "load_model",
        lambda path, **options: counts.append(0) or load(path, **options),
    )
    return counts


def test_averages_are_those_of_an_evaluation_on_the_same_rows(world: World, tmp_path: Path) -> None:
    choice = choose(world.base, world.adapters, world.tasks, FEW, settings=RANK)
    same_rows = []
    for task in world.tasks:
        prepared, origin = prepare_for_selection(task, RANK)
        assert origin == "held out"
        scored = {row.id for row in task.examples("test")}
        rows = prepared._examples  # type: ignore[attr-defined]
        assert not scored & {row.id for row in rows}
        assert len(rows) == 16
        file = tmp_path / f"{task.name}.jsonl"
        file.write_text("".join(json.dumps(row.fields) + "\n" for row in rows))
        same_rows.append(task.model_copy(update={"source": FileSource(file=file), "sample": ALL}))
    vectors = sm.load_task_vectors(world.base, world.adapters)
    updates = {candidate_name(c): vectors.merge(c) for c in named_candidates(FEW).values()}
    evaluation = evaluate(world.base, world.adapters | updates, same_rows, RANK)
    for standing in choice.outcome.standings:
        expected = evaluation.normalised(standing.name)
        assert standing.average is not None
        assert expected is not None
        if standing.stopped is None:
            assert standing.average.value == pytest.approx(expected.value)
            assert standing.rows == 32
    assert choice.base is not None
    at_base = evaluation.normalised("base")
    assert at_base is not None
    assert choice.base.value == pytest.approx(at_base.value)
    averages = {name: evaluation.normalised(name).value for name in updates}  # type: ignore[union-attr]
    assert averages[choice.outcome.best] == max(averages.values())
    assert "task_arithmetic:alpha=-1" not in choice.outcome.ties


def test_rows_are_asked_once_and_the_base_is_loaded_once(
    world: World, tmp_path: Path, asked: list[int]
) -> None:
    cache = ScoreCache(tmp_path / "cache")

    def rows(count: int) -> sm.Choice:
        asked.clear()
        settings = replace(RANK, rows=count)
        return choose(world.base, world.adapters, world.tasks, FEW, settings=settings, cache=cache)

    choice = rows(16)
    assert asked.count(0) == 1
    racing = sum(standing.rows for standing in choice.outcome.standings)
    assert sum(asked) == racing + 2 * 16 + 2 * 16  # the base all tasks, each fine-tune its own
    again = rows(16)
    assert not asked, "a race that was run was asked again"
    assert again == choice
    longer = rows(30)
    assert sum(asked) == sum(s.rows for s in longer.outcome.standings) - racing + 4 * 14


def test_the_recipe_makes_the_merge_that_was_asked(world: World, tmp_path: Path) -> None:
    choice = choose(world.base, world.adapters, world.tasks, FEW, settings=RANK)
    assert choice.recipe.method == choice.chosen
    write_recipe(choice.recipe, tmp_path / "recipe.yaml")
    merged = run(make_plan(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out"), Threads()).path
    model = AutoModelForCausalLM.from_pretrained(world.base)
    with sm.apply(model, sm.load_task_vectors(world.base, world.adapters).merge(choice.chosen)):
        for name, tensor in load_file(merged / "model.safetensors").items():
            assert torch.equal(model.state_dict()[name], tensor)


def test_a_reader_is_told_what_was_compared_and_how_sure_it_is(world: World) -> None:
    choice = choose(world.base, world.adapters, world.tasks, FEW, settings=RANK)
    report = choice.report
    assert choice.sentence in report
    assert f"**{choice.chosen}**" in choice.table
    lines = choice.table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "normalised average" in lines[0]
    assert lines[-1].startswith("| *base*")
    assert "Rows of one, two: held out" in report
    assert "its average is optimistic" in report
    records = choice.to_frame()
    pd.testing.assert_frame_equal(records, pd.DataFrame(choice.to_records()))
    assert set(records.candidate) == {"average", "star", "task_arithmetic:alpha=-1"}
    assert list(records[records.chosen].candidate) == [choice.chosen]
    assert json.loads(json.dumps(choice.to_json()))["recipe"]["method"] == choice.chosen
    shown = repr(choice).splitlines()
    assert shown[:2] == [f"Choice: {choice.chosen} of 3 candidates", f"  {choice.sentence}"]
    assert len(shown) == 2 + 3
    drawn = ElementTree.fromstring(f"<div>{choice._repr_html_()}</div>")
    assert drawn.findtext("p") == choice.sentence
    cells = [[cell.text or "" for cell in row] for row in drawn.iter("tr")]
    assert cells == choice.cells()
    assert [row[0] for row in cells[1:]] == [s.name for s in choice.outcome.standings] + ["base"]
    if len(choice.outcome.ties) > 1:
        assert choice.sentence.startswith("No clear difference between ")


def test_without_a_fine_tune_of_each_task_means_are_compared(world: World) -> None:
    models = {"one": world.adapters["one"], "other": world.adapters["two"]}
    choice = choose(world.base, models, world.tasks, FEW, settings=RANK)
    assert not choice.is_normalised
    assert "No model has the name of the task two" in choice.report
    assert "mean score" in choice.table
    normalised = choose(world.base, world.adapters, world.tasks, FEW, settings=RANK)
    # The fine-tunes have every row right, so the two are the same here.
    for mine, theirs in zip(choice.outcome.standings, normalised.outcome.standings, strict=True):
        assert mine.average is not None
        assert theirs.average is not None
        assert mine.average.value == pytest.approx(theirs.average.value)


def test_a_candidate_that_cannot_merge_the_models_is_left_out_with_the_reason(
    world: World, tmp_path: Path
) -> None:
    opposite = tmp_path / "two"
    opposite.mkdir()
    source = world.adapters["one"]
    (opposite / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    negated = {key: -t if ".lora_B." in key else t for key, t in tensors.items()}
    save_file(negated, opposite / "adapter_model.safetensors", metadata={"format": "pt"})
    models = {"one": source, "two": opposite}
    candidates = ["average+own_response", *FEW]
    choice = choose(world.base, models, world.tasks, candidates, settings=RANK)
    assert choice.left_out.keys() == {"average+own_response"}
    assert "Left out: average+own_response. own_response: the mean response" in choice.report
    with pytest.raises(StarmergeError, match="Only 1 of the candidates can merge these models"):
        choose(world.base, models, world.tasks, candidates[:2], settings=RANK)


def test_the_command_line_prints_the_race_and_writes_the_recipe(
    world: World, tmp_path: Path, starmerge: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    tasks = []
    for task in world.tasks:
        file = tmp_path / f"{task.name}.yaml"
        content = task.model_dump(mode="json", exclude={"kind", "name"})
        file.write_text(json.dumps(content))
        tasks.append(str(file))
    command = [
        *("choose", world.base, *world.adapters.values(), "-t", ",".join(tasks)),
        *("--scorer", "rank", "--rows", "16", "--no-cache"),
        *("-m", "task_arithmetic:alpha=0.5", "-m", "star:eta=60,noise_floor=off"),
    ]
    recipe = tmp_path / "made" / "recipe.yaml"
    finished = starmerge(*command, "-o", recipe)
    assert finished.returncode == 0, finished.stderr
    assert "| candidate" in finished.stdout
    assert "star:eta=60,noise_floor=off" in finished.stdout
    assert f"starmerge merge {recipe} -o FOLDER" in finished.stdout
    merged = starmerge("merge", recipe, "-o", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    finished = starmerge(*command, "-o", recipe, "--overwrite", "--json")
    assert finished.returncode == 0, finished.stderr
    content = json.loads(finished.stdout)
    assert content["recipe"]["method"] == load_recipe(recipe).method


def _choice(stopped: dict[str, str | None], best: str, chosen: str, p_value: float = 1.0) -> Choice:
    """Return a choice among candidates that were stopped or not, in the order given."""
    average, gap = Interval(0.5, 0.4, 0.6), Difference(-0.01, -0.05, 0.02, p_value, "t", 50)
    standings = tuple(
        Standing(name, 1, 8, (average,), None if name == best else gap, why)  # type: ignore[arg-type]
        for name, why in stopped.items()
    )
    ties = tuple(name for name, why in stopped.items() if why is None)
    recipe = make_recipe({"base": "a/b", "models": ["c/d"]})
    outcome = Outcome(standings, best, ties, chosen)
    return Choice(recipe, outcome, True, average, None, {}, ())


def test_the_sentence_says_how_sure_the_choice_is() -> None:
    clear = _choice({"a": None, "b": "behind"}, "a", "a")
    assert clear.sentence == "a is clearly better than all others: took it."
    ties = _choice({"a": None, "b": None, "c": None, "d": "behind"}, "b", "b")
    assert ties.sentence == "No clear difference between a, b and c: took b, the best."
    first = _choice({"a": None, "b": None}, "b", "a", p_value=0.73)
    assert first.sentence == (
        "No clear difference between a and b: took a, given before the best, b, whose lead is as "
        "likely as not chance (p = 0.73)."
    )
    short = _choice({"a": None, "b": "budget", "c": "budget"}, "a", "a")
    assert short.sentence == (
        "Took a, the best that the budget left. The budget stopped b and c, not clearly behind."
    )
    assert "a is not clearly better than the base" in short.report
    assert "| clearly behind |" in ties.table
    assert "| by the budget " in short.table


# --------------------------------------------------------------------------------- What is refused


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (["star"], r"at least two candidates, and there is 1 \(star\)"),
        ([], "there is none"),
        ("star", r"there is 1 \(star\)"),
        (["star", sm.Star(eta=40)], "The candidate star is given twice"),
        (["star", "average", sm.Star(eta=60), sm.Star(eta=60)], "star:eta=60 is given twice"),
        (["star", "averge"], "Did you mean 'average'"),
        (["star", "emr"], "emr makes a model for each task"),
        (["star", "regmean"], r"regmean needs a metric of the inputs.*merge --metric"),
    ],
)
def test_wrong_candidates_are_refused_before_anything_is_read(
    candidates: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose("no/such/base", ["no/such/model"], ["no such task"], candidates)


def test_what_else_is_wrong_is_refused_before_a_model_is_opened(world: World) -> None:
    nowhere = ("no/such/base/at/all", ["nor/such/a/model"])
    with pytest.raises(
        UsageError, match="7 rows of a task are too few to compare candidates. Give at least 8"
    ):
        choose(*nowhere, world.tasks, settings=Settings(rows=7))
    with pytest.raises(UsageError, match="There is no task. Give at least one"):
        choose(*nowhere, [])
    with pytest.raises(UsageError, match="No task is called 'pasd'"):
        choose(*nowhere, ["pasd"])
    with pytest.raises(UsageError, match="Two tasks are called 'one'"):
        choose(*nowhere, [world.tasks[0]] * 2)
    with pytest.raises(UsageError, match="the first round alone needs 48: 16 for each of 3"):
        choose(*nowhere, world.tasks, FEW, budget=47)
    with pytest.raises(UsageError, match="only the backend transformers allows"):
        choose(*nowhere, world.tasks, settings=Settings(backend="vllm"))
    with pytest.raises(UsageError, match="no/such/base/at/all does not exist"):
        choose(*nowhere, world.tasks, budget=10**6)


# -------------------------------------------------------------------------------------- Candidates


def test_the_default_candidates_differ_and_auto_is_the_first() -> None:
    names = [candidate_name(chain) for chain in default_candidates()]
    assert names[0] == "auto"
    assert {"star", "average", "tsv_m", "covariance+own_response"} <= set(names)
    assert sum(name.startswith("task_arithmetic:alpha=") for name in names) == 3
    assert list(named_candidates(None)) == names


# ---------------------------------------------------------------------- Other models, other tasks


def test_full_fine_tunes_of_an_image_classifier_race(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3
    )
    ResNetForImageClassification(config).save_pretrained(tmp_path / "base")
    pixels = np.random.default_rng(0).random((120, 8, 8, 3))
    models, tasks = {}, []
    for name in ("one", "two"):
        tuned = ResNetForImageClassification.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        models[name] = tmp_path / name
        tuned.save_pretrained(models[name])

        # Labels are what the fine-tune answers where no class is excluded.
        def task(labels: NDArray[Any], name: str = name, **options: Any) -> ImageTask:
            np.savez(tmp_path / f"{name}.npz", images=pixels, labels=labels)
            source = ArraySource(array=tmp_path / f"{name}.npz")
            return ImageTask(name=name, source=source, **options)

        whole = task(np.arange(120) % 3)
        answered = evaluate(tmp_path / "base", {name: models[name]}, [whole]).tuned[name]
        read = {p.id: p.response.removeprefix("LABEL_") for p in answered.predictions}
        labels = np.array([int(read[f"images/{n}"]) for n in range(120)])
        assert len(set(labels)) > 1
        tasks.append(task(labels, sample=Sample(kind="random", n=60)))
    candidates = ["average", sm.TaskArithmetic(alpha=-1)]
    choice = choose(tmp_path / "base", models, tasks, candidates, settings=Settings(rows=40))
    assert choice.is_normalised, "a fine-tune does not answer its own labels"
    assert choice.chosen == "average"
    assert "Rows of one, two: held out" in choice.report


def test_tasks_of_the_harness_race_on_the_rows_that_are_scored(
    world: World, tmp_path: Path
) -> None:
    rows = [{"q": f"w{20 + n} w2", "o": ["w10", "w11", "w13"], "a": n % 3} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{o}}",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "words.yaml").write_text(json.dumps(content))
    tasks = load_tasks(["lm-eval:words"], tmp_path)
    choice = choose(world.base, world.adapters, tasks, FEW)
    assert "Rows of lm-eval:words: those that `starmerge evaluate` scores" in choice.report
    assert not choice.is_normalised
    evaluation = evaluate(world.base, {}, tasks)
    assert choice.base is not None
    assert choice.base.value == evaluation.scores["base"]["lm-eval:words"].value
