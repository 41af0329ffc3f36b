"""Which runs a study has: combinations, grids, seeds, and what is refused."""

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.errors import UsageError
from starmerge_models.study.runs import combinations, label_of, runs_of
from starmerge_models.study.study_file import (
    Study,
    find_study,
    load_study,
    make_study,
    pool_of,
    studies,
)


@given(size=st.integers(1, 12), data=st.data(), most=st.integers(1, 30), seed=st.integers(0, 99))
def test_combinations_are_different_sets_and_share_the_models_out(
    size: int, data: st.DataObject, most: int, seed: int
) -> None:
    names = [f"m{n}" for n in range(size)]
    number = data.draw(st.integers(1, size))
    drawn = combinations(names, number, most, seed)
    assert len(set(drawn)) == len(drawn)
    assert len(drawn) <= min(most, math.comb(size, number))
    for models in drawn:
        assert len(set(models)) == number
        assert list(models) == sorted(models, key=names.index)
    # Of the sets cut from one shuffle, no two share a model.
    whole = size // number
    first = Counter(name for models in drawn[:whole] for name in models)
    assert max(first.values()) == 1
    # More combinations begin with the same ones.
    assert combinations(names, number, most + 3, seed)[: len(drawn)] == drawn


def test_all_sets_are_drawn_where_so_many_are_wanted() -> None:
    assert len(combinations("abcde", 2, 50, 0)) == 10
    assert combinations("abc", 3, 5, 1) == [("a", "b", "c")]


def test_the_draw_is_the_same_on_every_machine() -> None:
    assert combinations("abcdefgh", 3, 3, 0) == PINNED


PINNED = [("e", "f", "g"), ("b", "d", "h"), ("c", "f", "h")]


def small(**changes: object) -> Study:
    """Return a study of four of the demo's models."""
    content = {
        "name": "small",
        "base": "org/base",
        "models": {name: f"org/{name}" for name in ("past", "plural", "pos", "digits")},
        "tasks": ["demo/past", "demo/plural", "demo/pos", "demo/digits"],
        "methods": ["average", {"method": "star", "grid": {"eta": [20, 40]}}],
        "numbers": [2, "all", 9],
        "combinations": 2,
    }
    return make_study(content | changes)


def test_the_runs_of_a_study_are_its_bounds_and_every_merge_of_every_combination() -> None:
    study = small()
    runs = runs_of(study, pool_of(study))
    kinds = Counter(run.kind for run in runs)
    # Two combinations of two and the only one of four, three merges of each.
    assert kinds == {"base": 1, "fine-tune": 4, "merge": 9}
    assert [run.kind for run in runs[:5]] == ["base", *["fine-tune"] * 4]
    merges = [run for run in runs if run.kind == "merge"]
    assert [run.label for run in merges[:3]] == ["average", "star:eta=20", "star"]
    # First combinations of all numbers come first.
    assert [run.combination for run in merges] == [0] * 6 + [1] * 3
    assert all(run.tasks == run.models for run in merges)
    assert len({run.key for run in runs}) == len(runs)


def test_a_merge_is_asked_the_tasks_of_its_models_each_once() -> None:
    study = small(
        models={"a": {"path": "org/a", "task": "past"}, "b": {"path": "org/b", "task": "past"}},
        tasks=["demo/past", "demo/pos"],
        numbers=["all"],
    )
    pool = pool_of(study)
    assert list(pool.tasks) == ["past"]
    assert {run.tasks for run in runs_of(study, pool)} == {("past",)}


def test_methods_that_draw_are_run_with_each_seed_and_averaged_under_one_label() -> None:
    study = small(methods=["star", "dare+ties"], seeds=[0, 1], numbers=["all"])
    merges = [run for run in runs_of(study, pool_of(study)) if run.kind == "merge"]
    assert [run.label for run in merges] == ["star", "dare+ties", "dare+ties"]
    assert [run.parameters.get("dare.seed") for run in merges] == [None, 0, 1]
    fixed = small(methods=[{"method": "dare", "parameters": {"seed": 5}}], seeds=[0, 1])
    assert {run.parameters.get("seed") for run in runs_of(fixed, pool_of(fixed))} == {None, 5}


def test_a_label_leaves_out_what_stands_on_an_axis() -> None:
    parameters = {"star.eta": 20.0, "ties.k": 30.0}
    assert label_of("star+ties", parameters) == "star+ties:star.eta=20,ties.k=30"
    assert label_of("star+ties", parameters, ["eta"]) == "star+ties:ties.k=30"


def fails(match: str, **changes: object) -> None:
    with pytest.raises(UsageError, match=match):
        study = small(**changes)
        runs_of(study, pool_of(study))


def test_what_is_wrong_with_a_study_is_said() -> None:
    fails("merges 9 models or more, and its pool has 4", numbers=[9])
    fails("numbers.0: Input should be a valid integer or .* 'all' .got True", numbers=[True])
    fails("the merge star twice", methods=["star", {"method": "star", "grid": {"eta": [40]}}])
    fails("Did you mean 'star'", methods=["starr"])
    fails("no parameter 'etta'", methods=[{"method": "star", "grid": {"etta": [1]}}])
    fails(
        "'eta' stands in parameters and in grid",
        methods=[{"method": "star", "parameters": {"eta": 3}, "grid": {"eta": [1]}}],
    )
    fails("makes a model for each task", methods=["emr"])
    fails("metric of the inputs", methods=["regmean"])
    fails("the key 'method' is unknown", method="star")
    fails(
        "the model x has the task 'past2'.*Did you mean 'past'",
        models={"x": {"path": "org/x", "task": "past2"}},
    )
    fails("names no base", base=None)
    fails("names no models", models={})
    fails("parameter belongs to", figures=[{"figure": "best"}])
    fails(
        "the figure 'number' shows the method 'stra'.*Did you mean 'star'",
        figures=[{"figure": "number", "methods": ["average", "stra"]}],
    )
    fails(
        "shows the parameter 'etta'.*Did you mean 'eta'",
        figures=[{"figure": "best", "parameter": "etta"}],
    )
    fails(
        "shows the parameter 'eta', which none of its methods has",
        figures=[{"figure": "parameter", "parameter": "eta", "methods": ["average"]}],
    )
    fails("parameter belongs to", figures=[{"figure": "number", "parameter": "eta"}])


def test_more_combinations_than_there_are_cost_nothing() -> None:
    study = small(combinations=10**12)
    assert len(runs_of(study, pool_of(study))) < 100


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    texts = "labels: {a: [a], b: [b]}\nprompt: '{input}'\nname: past\nsource: {file: rows.jsonl}\n"
    (tmp_path / "rows.jsonl").write_text('{"input": "x", "label": "a"}\n')
    (tmp_path / "past.yaml").write_text(texts)
    with pytest.raises(UsageError, match="two tasks called 'past'"):
        pool_of(small(tasks=("demo/past", str(tmp_path / "past.yaml"), *small().tasks)))


def test_paths_of_a_file_begin_beside_it(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "mine.py").write_text(
        "from starmerge_models.methods.method import method, Merge\n"
        "from starmerge_models.methods.average import Average\n\n\n"
        "class Mine(Average):\n    name = 'mine'\n"
    )
    file = tmp_path / "own.yaml"
    file.write_text(
        "base: org/base\nmodels: {past: ./adapter, pos: org/pos}\n"
        "tasks: [demo/past, demo/pos]\nmethods: [average]\n"
    )
    study = load_study(file)
    assert study.name == "own"
    assert study.models["past"].path == str(tmp_path / "adapter")
    assert study.models["pos"].path == "org/pos"
    file.write_text("- a list\n")
    with pytest.raises(UsageError, match="is not a study"):
        load_study(file)
    with pytest.raises(UsageError, match="Did you mean 'numbers'"):
        find_study("number")


@pytest.mark.parametrize("name", sorted(studies()))
@pytest.mark.parametrize("suite", ["demo", "flan-t5", "llama-3.2", "mistral-nli"])
def test_every_shipped_study_has_runs_on_every_suite(name: str, suite: str) -> None:
    study = find_study(name).model_copy(update={"suite": suite})
    runs = runs_of(study, pool_of(study))
    merges = [run for run in runs if run.kind == "merge"]
    assert merges
    assert {"auto", "shares"} <= {run.label for run in merges}
    assert study.description
