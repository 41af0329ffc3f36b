"""A suite from one end to the other, on the real model; and the suites of the package."""

import re
from pathlib import Path

import pytest

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.results import load_results
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.evaluation.tasks.suites import find_suite, suites
from starmerge_models.study.suite import run_suite
from starmerge_models_demo import ADAPTERS


@pytest.mark.parametrize("name", sorted(suites()))
def test_a_suite_names_a_fine_tune_of_each_of_its_tasks(name: str) -> None:
    suite = find_suite(name)
    assert {find_task(task).name for task in suite.tasks} == suite.models.keys()
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", suite.base)
    assert suite.description


def test_a_suite_is_merged_and_scored(smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "base: HuggingFaceTB/SmolLM2-135M-Instruct\n"
        "tasks: [demo/language, demo/sentiment]\n"
        "models:\n"
        f"  language: {ADAPTERS}/language\n"
        f"  sentiment: ./sentiment\n"
        "published: {2 tasks: {star: 90.5}}\n"
    )
    (tmp_path / "sentiment").symlink_to(ADAPTERS / "sentiment")
    suite = find_suite(str(file))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "wonderful", "label": "positive"}\n')
    result = run_suite(
        suite,
        tmp_path / "out",
        methods=["average"],
        base=smollm2,
        rows_of={"demo/sentiment": rows},
        settings=Settings(rows=2),
        flat=tmp_path / "flat",
    )
    assert result.evaluation.tasks == ["language", "sentiment"]
    assert result.evaluation.scores["average"]["sentiment"].n == 1
    assert result.evaluation.normalised("average") is not None
    assert "Published (arXiv 2502.10339, 2 tasks;" in result.table
    assert "star 90.5" in result.table
    assert (tmp_path / "out" / "average" / "model.safetensors").is_file()
    assert result.chart.read_bytes().startswith(b"\x89PNG")
    scores, predictions = load_results(result.results)
    assert result.flat == tmp_path / "flat" / "language_sentiment"
    assert {file.name for file in result.flat.iterdir()} == {
        "pretrained.json",
        "lora.json",
        "average.json",
    }
    made = result.evaluation.provenance
    assert made is not None
    assert made.models["language"].path == str(ADAPTERS / "language")
    assert set(scores.model) == {"base", "language", "sentiment", "average"}
    assert len(predictions) == 3 * (2 + 1)

    with pytest.raises(UsageError, match="not empty"):
        run_suite(suite, tmp_path / "out", base=smollm2, tasks=["language"])


def test_what_is_wrong_with_a_suite_is_said_before_anything_is_merged(tmp_path: Path) -> None:
    suite = find_suite("llama-3.2")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="'sst3' is not a task of llama-3.2: .*sst2"):
        run_suite(suite, out, tasks=["sst3"])
    with pytest.raises(UsageError, match="Did you mean 'star'"):
        run_suite(suite, out, methods=["starr"])
    with pytest.raises(UsageError, match="the dataset .* cannot be loaded"):
        run_suite(suite, out, tasks=["sst2"])
    with pytest.raises(UsageError, match="Did you mean 'flan-t5'"):
        find_suite("flan-t6")
    (tmp_path / "bad.yaml").write_text("base: a/b\ntasks: []\nmodels: {}\n")
    with pytest.raises(UsageError, match=r"bad.yaml: tasks: Tuple should have at least 1 item"):
        find_suite(str(tmp_path / "bad.yaml"))
    assert not out.exists()
