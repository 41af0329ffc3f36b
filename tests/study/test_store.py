"""The store of a study: what is in it, what a kill leaves, what it refuses to mix."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from starmerge_models.errors import Interrupted, StarmergeError, UsageError
from starmerge_models.study.runs import runs_of
from starmerge_models.study.store import HEAD, RUNS, load_store, open_store
from starmerge_models.study.study_file import pool_of
from tests.study.studies import head_of, written_store


def test_a_store_gives_back_what_was_added(tmp_path: Path) -> None:
    study, store = written_store(tmp_path / "s")
    read = load_store(tmp_path / "s")
    assert [r.run.key for r in read.records] == [r.run.key for r in store.records]
    assert [r.lines for r in read.records] == [r.lines for r in store.records]
    assert all(run in read for run in runs_of(study, pool_of(study)))
    assert repr(read) == f"<Store of written: {len(store.records)} runs>"
    frame = read.to_frame()
    assert len(frame) == sum(len(r.lines) for r in store.records)
    assert {"label", "kind", "n", "models", "task", "score", "seen"} <= set(frame.columns)
    assert frame.query("label == 'star' and n == 4").task.tolist() == list(pool_of(study).tasks)


def test_wherever_a_run_is_cut_off_the_ones_before_it_stay(tmp_path: Path) -> None:
    study, _ = written_store(tmp_path / "s")
    file = tmp_path / "s" / RUNS
    content = file.read_bytes()
    ends, end = [0], 0
    waiting = 0
    for raw in content.splitlines(keepends=True):
        end += len(raw)
        waiting += 1
        if waiting == len(json.loads(raw)["tasks"]):
            ends.append(end)
            waiting = 0
    for cut in range(0, len(content), 97):
        file.write_bytes(content[:cut])
        with open_store(tmp_path / "s", head_of(study)) as store:
            whole = sum(end <= cut for end in ends) - 1
            assert len(store.records) == whole
        assert file.read_bytes() == content[: ends[whole]]


def test_a_damaged_line_in_the_middle_is_said_and_nothing_is_removed(tmp_path: Path) -> None:
    study, _ = written_store(tmp_path / "s")
    file = tmp_path / "s" / RUNS
    lines = file.read_bytes().splitlines(keepends=True)
    for broken in (b"{\n", b"[]\n", b'{"kind": "merge"}\n'):
        file.write_bytes(b"".join([*lines[:3], broken, *lines[4:]]))
        before = file.read_bytes()
        with (
            pytest.raises(StarmergeError, match=r"line 4 is no line of a store"),
            open_store(tmp_path / "s", head_of(study)),
        ):
            pass
        assert file.read_bytes() == before


def test_lines_that_are_not_the_next_of_their_run_are_damage(tmp_path: Path) -> None:
    study, _ = written_store(tmp_path / "s")
    file = tmp_path / "s" / RUNS
    lines = file.read_bytes().splitlines(keepends=True)
    short = json.dumps(json.loads(lines[1]) | {"seen": [1]}).encode() + b"\n"
    for content, number, why in (
        ([lines[0], *lines], 2, "its task is 'past', not 'plural'"),
        ([*lines[:1], *lines[2:]], 2, "its task is 'pos', not 'plural'"),
        ([*lines[:3], *lines[4:]], 4, "the run before it lacks a line"),
        ([lines[0], short, *lines[2:]], 2, "it says 12 rows and has 1"),
    ):
        file.write_bytes(b"".join(content))
        with pytest.raises(StarmergeError, match=f"line {number} is no line of a store .*{why}"):
            load_store(tmp_path / "s")
    file.write_bytes(b"".join(lines + lines[:4]))  # a run that stands there twice is the same run
    assert len(load_store(tmp_path / "s").records) == len(runs_of(study, pool_of(study)))


def test_texts_may_hold_any_character(tmp_path: Path) -> None:
    study, store = written_store(tmp_path / "s")
    run = store.records[0].run
    line = dict(store.records[0].lines[0]) | {"error": "a\u2028b\x85c"}
    with open_store(tmp_path / "s", head_of(study)) as again:
        again.add(run, [line])
        assert again.get(run) == load_store(tmp_path / "s").get(run)
        found = again.get(run)
        assert found is not None
        assert found.error == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": {"name": "org/base", "files": "ab"}}, r"a change of: base \("),
        ({"models": {}}, r"a change of: models \(past, plural, pos, …\)"),
        ({"tasks": {"past": {"rows": 3, "asked": "cc"}}}, "a change of: tasks"),
        ({"asked": {"scorer": "generate", "matching": "strict", "dtype": "float32"}}, "asked"),
        ({"seed": 1}, "a change of: seed"),
        ({"code": "de"}, "a change of: code"),
        ({"versions": {"starmerge": "1"}}, r"a change of: versions \(starmerge\)"),
        ({"device": "cuda"}, "a change of: device"),
    ],
)
def test_runs_of_other_models_tasks_or_code_are_not_mixed(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    study, _ = written_store(tmp_path / "s")
    before = {f.name: f.read_bytes() for f in (tmp_path / "s").iterdir()}
    with (
        pytest.raises(UsageError, match=said),
        open_store(tmp_path / "s", head_of(study) | change),
    ):
        pass
    assert {f.name: f.read_bytes() for f in (tmp_path / "s").iterdir()} == before


def test_a_study_may_grow_in_its_store(tmp_path: Path) -> None:
    study, store = written_store(tmp_path / "s")
    grown = study.model_copy(update={"numbers": (2, 3, "all")})
    begun = load_store(tmp_path / "s").head["begun"]
    with open_store(tmp_path / "s", head_of(grown) | {"begun": "later"}) as again:
        assert len(again.records) == len(store.records)
        left = [run for run in runs_of(grown, pool_of(grown)) if run not in again]
        assert {len(run.models) for run in left} == {3}
    assert load_store(tmp_path / "s").head["study"]["numbers"] == [2, 3, "all"]
    assert load_store(tmp_path / "s").head["begun"] == begun


def test_failed_runs_are_kept_counted_and_made_again_on_request(tmp_path: Path) -> None:
    study, store = written_store(tmp_path / "s")
    grown = study.model_copy(update={"numbers": (3,)})
    run = next(r for r in runs_of(grown, pool_of(grown)) if r.kind == "merge")
    with open_store(tmp_path / "s", head_of(study)) as again:
        again.add(run, [{"error": "it broke", "date": "x"}])
    read = load_store(tmp_path / "s")
    assert [r.error for r in read.failures] == ["it broke"]
    assert repr(read).endswith("1 of them failed>")
    assert "it broke" not in read.to_frame().to_string()
    with open_store(tmp_path / "s", head_of(study), retry=True) as again:
        assert run not in again
        assert len(again.records) == len(store.records)
    assert not load_store(tmp_path / "s").failures


def test_undefined_scores_are_null(tmp_path: Path) -> None:
    study, store = written_store(tmp_path / "s")
    grown = study.model_copy(update={"numbers": (3,)})
    run = next(r for r in runs_of(grown, pool_of(grown)) if r.kind == "merge")
    kept = ("metric", "low", "high", "rows", "unparsed", "shortened", "seen")
    line = {key: store.records[0].lines[0][key] for key in kept}
    with open_store(tmp_path / "s", head_of(study)) as again:
        again.add(run, [line | {"task": task, "score": math.nan} for task in run.tasks])
    assert "NaN" not in (tmp_path / "s" / RUNS).read_text()
    assert load_store(tmp_path / "s").records[-1].lines[0]["score"] is None


def test_two_processes_do_not_add_to_one_store(tmp_path: Path) -> None:
    study, _ = written_store(tmp_path / "s")
    with (
        open_store(tmp_path / "s", head_of(study)),
        pytest.raises(UsageError, match="in use by another run"),
        open_store(tmp_path / "s", head_of(study)),
    ):
        pass


def test_a_signal_tells_of_the_store_that_stays(tmp_path: Path) -> None:
    study, store = written_store(tmp_path / "s")
    with (
        pytest.raises(Interrupted) as interruption,
        open_store(tmp_path / "s", head_of(study)),
    ):
        raise Interrupted(signal.SIGINT)
    assert interruption.value.kept == [tmp_path / "s"]
    assert len(load_store(tmp_path / "s").records) == len(store.records)


def test_a_store_may_be_named_by_a_link(tmp_path: Path) -> None:
    study, store = written_store(tmp_path / "s")
    (tmp_path / "link").symlink_to(tmp_path / "s")
    with open_store(tmp_path / "link", head_of(study)) as linked:
        assert len(linked.records) == len(store.records)


def test_only_a_store_is_added_to(tmp_path: Path) -> None:
    study, _ = written_store(tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with (
        pytest.raises(UsageError, match="is not the store of a study"),
        open_store(tmp_path / "other", head_of(study)),
    ):
        pass
    with pytest.raises(UsageError, match="is not the store of a study"):
        load_store(tmp_path / "other")
    head = json.loads((tmp_path / "s" / HEAD).read_text())
    (tmp_path / "s" / HEAD).write_text(json.dumps(head | {"schema": 99}))
    with pytest.raises(StarmergeError, match="schema 99"):
        load_store(tmp_path / "s")
    (tmp_path / "s" / HEAD).write_text(json.dumps({k: v for k, v in head.items() if k != "tasks"}))
    with pytest.raises(StarmergeError, match="lacks the key 'tasks'"):
        load_store(tmp_path / "s")
