"""Reports of the commands: pages of what they found, on a tiny model."""

import json
from pathlib import Path

import pytest

from starmerge_models.cli import app
from starmerge_models.errors import UsageError
from tests.evaluation.tiny_world import World


def _run(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_a_report_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    for command in (
        ("evaluate", "no/such", "-t", "digits"),
        ("choose", "no/such", "a", "-t", "digits"),
        ("suite", "demo", "-o", tmp_path / "out"),
        ("demo", "run", "-o", tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match=r"taken\.html exists"):
            _run(*command, "--report", taken)
        with pytest.raises(UsageError, match=r"ends in \.html"):
            _run(*command, "--report", tmp_path / "report.pdf")
    assert list(tmp_path.iterdir()) == [taken]


def test_evaluate_and_choose_end_in_a_page(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = []
    for task in world.tasks:
        file = tmp_path / f"{task.name}.yaml"
        file.write_text(json.dumps(task.model_dump(mode="json", exclude={"kind", "name"})))
        tasks.append(str(file))
    common = (
        world.base, *world.adapters.values(),
        "-t", ",".join(tasks), "--scorer", "rank", "--rows", 16, "--no-cache",
    )  # fmt: skip
    scores, choice = tmp_path / "scores.html", tmp_path / "choice.html"
    _run("evaluate", *common, f"again={world.adapters['one']}", "--report", scores)
    assert f"Report: {scores}" in capsys.readouterr().out
    text = scores.read_text(encoding="utf-8")
    assert "<title>base: 1 model on 2 tasks</title>" in text
    assert str(world.base.parent) not in text.partition("Where the numbers come from")[0]
    candidates = ("-m", "average", "-m", "task_arithmetic:alpha=0.5")
    _run("choose", *common, *candidates, "--report", choice)
    assert f"Report: {choice}" in capsys.readouterr().out
    text = choice.read_text(encoding="utf-8")
    assert "<title>How to merge 2 fine-tunes of base</title>" in text
    assert "task_arithmetic:alpha=0.5" in text
    with pytest.raises(UsageError, match="exists"):
        _run("evaluate", *common, "--report", scores)
