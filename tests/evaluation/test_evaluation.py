"""Where scores come from, and how an evaluation shows itself."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from blake3 import blake3

import starmerge_models as sm
from starmerge_models.evaluation.cache import ScoreCache
from starmerge_models.evaluation.evaluation import SCHEMA, Evaluation
from starmerge_models.evaluation.model_groups import groups
from starmerge_models.evaluation.results import load_results, write_results
from starmerge_models.evaluation.runner import cached_answers, evaluate, prepare_tasks
from starmerge_models.evaluation.scoring.metrics import Prediction, score
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.table import markdown, notes
from starmerge_models.evaluation.tasks import task_of_rows
from starmerge_models.progress import Progress
from tests.evaluation.tiny_world import World

RANK = Settings("rank", rows=6)


@pytest.fixture(scope="module")
def evaluation(world: World) -> Evaluation:
    update = sm.load_task_vectors(world.base, world.adapters).merge("average")
    return evaluate(world.base, {**world.adapters, "mean": update}, world.tasks, RANK)


def _blake3_of_folder(folder: Path) -> str:
    """Hash the hashes of the files that have a part in answers, by name."""
    hashes = {
        file.name: blake3(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.suffix != ".md"
    }
    return blake3(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def test_models_and_rows_are_recorded_by_their_content(
    world: World, evaluation: Evaluation
) -> None:
    made = evaluation.provenance
    assert made is not None
    assert list(made.models) == ["base", "one", "two", "mean"]
    base, one = made.models["base"], made.models["one"]
    assert (base.path, base.dtype, base.revision) == (str(world.base), "float32", None)
    assert base.blake3 == _blake3_of_folder(world.base)
    assert (one.path, one.blake3) == (
        str(world.adapters["one"]),
        _blake3_of_folder(world.adapters["one"]),
    )
    assert made.models["mean"].path is None
    task = made.tasks["one"]
    assert (task.rows, task.match, task.metric, task.plugins) == (6, "whole-word", "accuracy", {})
    assert task.source == str(world.base.parent / "one.jsonl")
    assert task.blake3 == world.tasks[0].fingerprint(world.tasks[0].examples("test", 6))
    assert task.held_out is not None
    assert task.held_out + (task.training or 0) == 200
    assert (made.rows, made.device, made.backend) == (6, "cpu", "transformers")
    assert {"python", "torch", "transformers", "starmerge"} <= made.versions.keys()
    age = datetime.now(timezone.utc) - datetime.fromisoformat(made.date)
    assert 0 <= age.total_seconds() < 3600


def test_other_rows_or_another_update_have_other_hashes(
    world: World, evaluation: Evaluation
) -> None:
    update = sm.load_task_vectors(world.base, world.adapters).merge("task_arithmetic")
    other = evaluate(world.base, {"mean": update}, world.tasks, replace(RANK, rows=5)).provenance
    made = evaluation.provenance
    assert other is not None
    assert made is not None
    assert other.models["base"] == made.models["base"]
    assert other.models["mean"] != made.models["mean"]
    assert other.tasks["one"].blake3 != made.tasks["one"].blake3


def test_results_bring_the_provenance_back(evaluation: Evaluation, tmp_path: Path) -> None:
    write_results(tmp_path / "out", evaluation, markdown(evaluation))
    results = load_results(tmp_path / "out")
    assert evaluation.provenance is not None
    assert results.provenance == evaluation.provenance.to_json()
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["schema_version"] == SCHEMA
    pd.testing.assert_frame_equal(results.scores, evaluation.to_frame())
    scores, predictions = results
    assert scores is results.scores
    assert predictions is results.predictions
    lines = repr(results).splitlines()
    assert len(lines) == 3
    assert lines[1:] == ["  tasks: one, two", "  models: base, one, two, mean"]
    assert results.table.loc["one", "mean"] == evaluation.scores["mean"]["one"].value
    assert list(results.table.columns) == ["base", "one", "two", "mean"]
    assert "<th>mean</th>" in results._repr_html_()


def test_rows_that_count_as_training_rows_are_said(world: World, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"input": f"w{n % 40} w{n}", "label": ("w10", "w11")[n % 2]} for n in range(50)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_of_rows(file)
    n = len(task.examples("test"))
    said = "rows: the others count as training rows (--all-rows scores all)."
    whole = evaluate(world.base, {}, [task], Settings("rank"))
    assert f"mine: scored {n} of 50 {said}" in notes(whole)
    few = evaluate(world.base, {}, [task], Settings("rank", rows=3))
    assert f"mine: scored 3 of 50 rows: {50 - n} of the others count as training" in notes(few)[0]


def test_repr_and_notebooks_show_models_tasks_and_averages(evaluation: Evaluation) -> None:
    average = evaluation.normalised("mean")
    assert average is not None
    assert repr(evaluation).splitlines() == [
        "Evaluation: 4 models, 2 tasks (rank, strict), 2 fine-tunes",
        "  tasks: one, two",
        f"  base: normalised average {evaluation.normalised('base').value:.3f}",  # type: ignore[union-attr]
        f"  mean: normalised average {average.value:.3f}",
    ]
    drawn = ElementTree.fromstring(evaluation._repr_html_())
    head, *rows = [[cell.text or "" for cell in row] for row in drawn.iter("tr")]
    assert head == ["task", "n", "base", "fine-tuned", "mean"]
    assert [row[0] for row in rows] == ["one", "two", "normalised average"]
    assert rows[-1][-1].startswith(f"{average.value:.3f} [")


def test_repr_fits_a_screen_whatever_there_is() -> None:
    right = score([Prediction("1", "x", "x", "x", 1.0)], "accuracy")
    tasks = {f"task{number}": right for number in range(100)}
    models = dict.fromkeys(("base", *(f"m{number}" for number in range(99))), tasks)
    lines = repr(Evaluation("generate", "strict", models, {})).splitlines()
    assert len(lines) == 11
    assert max(map(len, lines)) < 100
    assert lines[1].endswith("… and 92 more")
    assert lines[3] == "  m0: mean score 1.000"
    assert lines[-1] == "  … and 92 more models: to_frame() has all"


class _Heard(Progress):
    """Writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.units = 0

    def __call__(self, units: int) -> None:
        self.units += units

    def waits_for(self, what: str) -> None:
        self.said.append(what)


def test_the_progress_says_what_is_waited_for(world: World, tmp_path: Path) -> None:
    heard, cache = _Heard(), ScoreCache(tmp_path / "cache")
    prepared = prepare_tasks(world.tasks, RANK, progress=heard)
    assert heard.said == ["reading the rows of one", "reading the rows of two"]
    (group,) = groups(
        world.base,
        world.adapters,
        kind="text",
        device=None,
        dtype="auto",
        backend="transformers",
    )
    both = list(prepared.values())
    heard.said.clear()
    for name in ("base", "two"):
        cached_answers(name, group, both, RANK, cache, heard)
    assert heard.said == [
        "hashing base",
        "loading base",
        "asking base: one",
        "asking base: two",
        "hashing two",
        "loading adapters one, two",
        "asking two: one",
        "asking two: two",
    ]
    heard.said.clear()
    cached_answers("base", group, both, RANK, cache, heard)
    assert heard.said == ["hashing base"]  # all is known
    assert heard.units == 3 * 12
