"""Plug-ins: methods, metrics and tasks of files and of installed packages, right and wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

import starmerge_models as sm
from starmerge_models.checkpoints.hashing import blake3_of
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.runner import evaluate
from starmerge_models.evaluation.scoring.comparison import paired
from starmerge_models.evaluation.scoring.metrics import (
    RESAMPLES,
    Prediction,
    metric,
    resample,
    score,
)
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.evaluation.tasks.files import load_task
from starmerge_models.evaluation.tasks.suites import load_suite
from starmerge_models.methods import METHODS, make_pipeline
from starmerge_models.methods.pipeline import as_pipeline, split_chain
from starmerge_models.recipe import make_recipe
from starmerge_models.recipe_file import load_recipe, write_recipe
from starmerge_models.study.choose import choose
from tests.conftest import MakeAdapter
from tests.evaluation.tiny_world import World, make_world
from tests.installing import install

Run = Callable[..., subprocess.CompletedProcess[str]]

HEAD = """
from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from starmerge_models.deltas import Delta, total
from starmerge_models.methods.method import Deltas, Merge, TensorContext, method

"""
METHOD = '''
@method("half_sum")
class HalfSum(Merge):
    """A scaled sum of the task vectors, by default half of it."""

    alpha: Annotated[float, Field(gt=0, description="factor of the sum")] = 0.5

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        return total(deltas).scaled(self.alpha)
'''
METRICS = """
from starmerge_models.evaluation.scoring.metrics import metric

@metric("length")
def length(row):
    return min(1, len(row.response) / len(row.gold))

@metric("corpus_length", of=lambda sums: sums[0] / sums[1])
def corpus_length(row):
    return len(row.response), len(row.gold)

def undecorated(row):
    return 1.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file with a method, in a folder of its own."""
    path = tmp_path / "code" / "mine.py"
    path.parent.mkdir()
    path.write_text(HEAD + METHOD)
    return path


def test_a_method_of_a_file_is_like_any_other(file: Path) -> None:
    made = make_pipeline(f"star + {file}:HalfSum", {"eta": 60, "half_sum.alpha": 2})
    assert made.parameters()["star.eta"] == 60
    assert made.parameters()["half_sum.alpha"] == 2
    assert made.name == f"star+{file}:HalfSum"
    assert make_pipeline(made.name, made.parameters()) == made
    assert "half_sum" not in METHODS
    (origin,) = made.plugins.values()
    assert origin.record() == {"file": "mine.py", "blake3": blake3_of(file)}


def test_a_file_is_executed_once_and_again_when_it_has_changed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    file.write_text(f"{HEAD}open({str(log)!r}, 'a').write('x')\n{METHOD}")
    monkeypatch.chdir(file.parent)
    first = make_pipeline("mine.py:HalfSum")
    assert make_pipeline(f"{file}:HalfSum") == first
    assert first.name == "mine.py:HalfSum"
    assert log.read_text() == "x"
    file.write_text(file.read_text().replace("= 0.5", "= 0.75"))
    assert make_pipeline("mine.py:HalfSum").parameters() == {"alpha": 0.75}
    assert log.read_text() == "xx"


@pytest.mark.parametrize(
    ("source", "name", "kind", "message"),
    [
        (
            "x = (",
            "X",
            StarmergeError,
            "mine.py cannot be loaded: SyntaxError: '(' was never closed (mine.py, line 1)",
        ),
        ("import sys\n1 / 0", "X", StarmergeError, "cannot be loaded: line 2: ZeroDivisionError"),
        ("import gone_away", "X", StarmergeError, "No module named 'gone_away'"),
        ("raise SystemExit(3)", "X", StarmergeError, "line 1: SystemExit: 3"),
        ("x = 1", "X", UsageError, "mine.py has no 'X'. It has no method."),
        (HEAD + METHOD, "HalfSun", UsageError, "has no 'HalfSun'. Did you mean 'HalfSum'?"),
        ("X = 3", "X", UsageError, "mine.py:X is no method: it is of the type int"),
        ("def X(): pass", "X", UsageError, "it is of the type function, and a method is a class"),
        ("class X: pass", "X", UsageError, "is one of Transform, Merge or PostStep"),
        (
            HEAD + METHOD.replace("@", "#"),
            "HalfSum",
            UsageError,
            'it is not decorated. Write @method("name") above it',
        ),
        (
            HEAD + METHOD + "\nclass Sub(HalfSum):\n    pass\n",
            "Sub",
            UsageError,
            "it is not decorated",
        ),
        (
            HEAD + METHOD.replace("def merge", "def merg"),
            "HalfSum",
            UsageError,
            "it does not define merge",
        ),
        (
            HEAD + METHOD.replace('"half_sum"', '"star"'),
            "HalfSum",
            UsageError,
            "mine.py:HalfSum calls itself 'star', and so does the method of starmerge",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    file: Path, source: str, name: str, kind: type[Exception], message: str
) -> None:
    file.write_text(source)
    before = dict(METHODS)
    with pytest.raises(kind) as error:
        make_pipeline(f"{file}:{name}")
    assert type(error.value) is kind
    assert message in str(error.value)
    assert dict(METHODS) == before


def test_wrong_names_and_parameters_are_refused(file: Path, tmp_path: Path) -> None:
    for reference, message in (
        (f"{tmp_path}/gone.py:X", f"There is no file {tmp_path}/gone.py"),
        (f"{tmp_path}/x.py/y.py:X", "There is no file"),
        (str(file), re.escape(f"Of a file say which: {file}:NAME.")),
        (f"{file}:HalfSum+average", "a chain has one merge"),
    ):
        with pytest.raises(UsageError, match=message):
            make_pipeline(reference)
    with pytest.raises(UsageError, match=r"mine.py:HalfSum' has no parameter 'beta'. .*alpha"):
        make_pipeline(f"{file}:HalfSum", {"beta": 1})
    with pytest.raises(UsageError, match=r"alpha: Input should be greater than 0 \(got -1\)"):
        make_pipeline(f"{file}:HalfSum", {"alpha": -1})


def test_two_files_may_not_give_a_chain_two_methods_of_one_name(file: Path) -> None:
    other = file.with_name("other.py")
    transform = METHOD.replace("(Merge)", "(Transform)").replace("def merge(", "def apply(")
    other.write_text(HEAD.replace("Merge,", "Transform,") + transform)
    with pytest.raises(UsageError, match=r"other.py:HalfSum and .*mine.py:HalfSum both call"):
        make_pipeline(f"{other}:HalfSum+{file}:HalfSum")
    with pytest.raises(UsageError, match="half_sum stands there twice"):
        make_pipeline(f"{file}:HalfSum+{file.parent}/../code/mine.py:HalfSum")


def test_a_chain_is_split_at_its_plus_signs_alone() -> None:
    assert split_chain("star + ties") == ["star", "ties"]
    assert split_chain("star+a.py:A+b/c.py:B") == ["star", "a.py:A", "b/c.py:B"]
    assert split_chain("star+/a+b/c.py:C+scale") == ["star", "/a+b/c.py:C", "scale"]


def test_a_candidate_has_its_parameters_after_the_file(file: Path) -> None:
    made = as_pipeline(f"star+{file}:HalfSum:alpha=2,eta=60")
    assert made == make_pipeline(f"star+{file}:HalfSum", {"alpha": 2, "eta": 60})
    assert as_pipeline(f"{file}:HalfSum") == make_pipeline(f"{file}:HalfSum")
    with pytest.raises(UsageError, match="parameters follow the colon"):
        as_pipeline(f"{file}:HalfSum:")


def test_a_name_that_is_taken_is_refused_and_a_cell_may_run_again() -> None:
    source = HEAD + METHOD.replace("half_sum", "sum_of_a_notebook")
    sys.modules["notebook"] = ModuleType("notebook")
    names = vars(sys.modules["notebook"])
    try:
        for _ in range(2):
            exec(source, names)
        assert METHODS.find("sum_of_a_notebook") is names["HalfSum"]
        (origin,) = make_pipeline("sum_of_a_notebook").plugins.values()
        assert origin.record() == {"module": "notebook"}
        with pytest.raises(UsageError, match=r"notebook.Other calls itself .*notebook.HalfSum"):
            exec(source.replace("HalfSum", "Other"), names)
        with pytest.raises(UsageError, match=r"starmerge_models.methods.star.Star"):
            exec(source.replace("sum_of_a_notebook", "star"), names)
        with pytest.raises(UsageError, match=r"starmerge_models.mergekit.method.Mergekit"):
            exec(source.replace("sum_of_a_notebook", "mergekit"), names)
    finally:
        del METHODS._others["sum_of_a_notebook"], sys.modules["notebook"]


_HOME = "starmerge_models.mergekit.method"
_FIRST = {
    "from starmerge_models.methods import METHODS; METHODS['star']; list(METHODS)": False,
    "from starmerge_models.methods import METHODS; METHODS['mergekit']": True,
    "from starmerge_models.mergekit.method import Mergekit": True,
    "from starmerge_models import Mergekit": True,
}
"""What a program does first, and whether it loads mergekit's dialect."""


def test_a_dialects_method_is_loaded_when_it_is_asked_for() -> None:
    """Each in a fork of a process that has imported nothing of ours, but torch and pydantic."""
    code = f"""
import os
import sys
import pydantic
import torch
for first, loaded in {_FIRST!r}.items():
    assert not any(name.startswith("starmerge_models") for name in sys.modules)
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, first
        continue
    exec(first)
    assert ({_HOME!r} in sys.modules) is loaded
    import starmerge_models
    from starmerge_models.methods import METHODS
    assert METHODS["mergekit"] is METHODS.built_in["mergekit"] is starmerge_models.Mergekit
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_merges_from_the_command_line_and_from_recipes_elsewhere(
    starmerge: Run, tiny_base: Path, make_adapter: MakeAdapter, file: Path, tmp_path: Path
) -> None:
    one, two = make_adapter("one", seed=1), make_adapter("two", seed=2)
    command = ("merge", tiny_base, one, two)
    method = ("-m", "star+code/mine.py:HalfSum", "-p", "half_sum.alpha=0.4")
    planned = starmerge(*command, *method, "-o", "out", "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert f"half_sum: of the file {file}" in planned.stdout.replace("\n", "")
    done = starmerge(*command, *method, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sm.merge(tiny_base, [one, two], "star+task_arithmetic", output=tmp_path / "usual")
    weights = (tmp_path / "usual" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights

    origin = {"half_sum": {"file": "mine.py", "blake3": blake3_of(file)}}
    recipe = json.loads((tmp_path / "out" / "merge_report.json").read_text())["recipe"]
    assert recipe["plugins"] == origin
    card = (tmp_path / "out" / "README.md").read_text()
    in_card = yaml.safe_load(card.partition("```yaml")[2].partition("```")[0])
    assert in_card == recipe

    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(in_card, sort_keys=False))
    with pytest.raises(UsageError, match=f"There is no file {folder / 'code' / 'mine.py'}"):
        load_recipe(folder / "recipe.yaml")
    (folder / "code").symlink_to(file.parent)
    again = starmerge("merge", "recipes/recipe.yaml", "-o", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights

    file.write_text(file.read_text() + "# changed\n")
    old = origin["half_sum"]["blake3"]
    with pytest.raises(UsageError, match=f"'half_sum' was file mine.py, blake3 {old} when the"):
        load_recipe(folder / "recipe.yaml")


def test_a_recipe_with_a_plug_in_is_written_for_whoever_reads_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    recipe = make_recipe({"base": "a/b", "models": ["c/d"], "method": "star+mine.py:HalfSum"})
    for target, written in (
        (tmp_path / "recipe.yaml", "star+code/mine.py:HalfSum"),
        (tmp_path / "other" / "recipe.yaml", f"star+{file}:HalfSum"),
    ):
        write_recipe(recipe, target)
        assert yaml.safe_load(target.read_text())["method"] == written
        assert load_recipe(target).make_pipeline() == recipe.make_pipeline()
    with pytest.raises(UsageError, match="'plugins' speaks of 'other', which is no plug-in"):
        make_recipe({**recipe.model_dump(), "plugins": {"other": {"package": "x"}}})


def test_the_report_names_the_file_of_a_method_that_is_given_as_an_object(
    tiny_base: Path, make_adapter: MakeAdapter, file: Path, tmp_path: Path
) -> None:
    adapters = [make_adapter("one", seed=1), make_adapter("two", seed=2)]
    method = METHODS.find(f"{file}:HalfSum")(alpha=2)
    result = sm.merge(tiny_base, adapters, method, output=tmp_path / "out")
    recipe = result.report.content["recipe"]
    assert recipe["method"] == f"{file}:HalfSum"
    assert recipe["plugins"]["half_sum"]["blake3"] == blake3_of(file)
    vectors = sm.load_task_vectors(tiny_base, adapters)
    merged = vectors.merge(f"{file}:HalfSum")
    usual = vectors.merge(sm.TaskArithmetic(alpha=0.5))
    assert merged.keys() == usual.keys()
    for name, delta in merged.items():
        assert (delta.to_dense() == usual[name].to_dense()).all()


def test_nothing_is_executed_that_a_model_s_folder_names(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter("adapter")
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\n"
    (adapter / "mine.py").write_text(trap + HEAD + METHOD)
    recipe = "method: mine.py:HalfSum\nplugins: {}\n"
    (adapter / "README.md").write_text(f"---\n{recipe}---\n\n```yaml\n{recipe}```\n")
    (adapter / "recipe.yaml").write_text(recipe)
    (adapter / "merge_report.json").write_text(json.dumps({"recipe": {"method": "mine.py:X"}}))
    sm.merge(tiny_base, [adapter], output=tmp_path / "out")
    assert not (tmp_path / "sprung").exists()


# Metrics and tasks.


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_choose_lets_a_plug_in_race(world: World, file: Path, tmp_path: Path) -> None:
    candidates = [f"{file}:HalfSum", sm.TaskArithmetic(alpha=-1)]
    settings = Settings("rank", rows=16)
    choice = choose(world.base, world.adapters, world.tasks, candidates, settings=settings)
    assert choice.chosen == f"{file}:HalfSum"
    write_recipe(choice.recipe, tmp_path / "recipe.yaml")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.method == f"{file}:HalfSum"
    assert recipe.plugins["half_sum"]["blake3"] == blake3_of(file)


def test_a_task_file_may_name_a_metric_and_a_generator_beside_it(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        METRICS + "\ndef rows(generator):\n"
        "    for n in range(60):\n"
        "        yield {'input': f'w{n} w2', 'label': ['w10', 'w11'][n % 2]}\n"
    )
    content = {
        "source": {"generator": "mine.py:rows"},
        "prompt": "{input}",
        "labels": ["w10", "w11"],
        "metric": "mine.py:length",
    }
    tasks = []
    for name in ("length", "corpus_length"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content | {"metric": f"mine.py:{name}"}))
        tasks.append(load_task(file))
    result = evaluate(world.base, {"one": world.adapters["one"]}, tasks, Settings("rank", rows=10))
    for name, scores in result.scores["one"].items():
        assert scores.metric == name
        assert scores.n == 10
        assert scores.value == 1  # the labels are of one length
    assert {p.credit for p in result.scores["one"]["length"].predictions} == {1.0}


def test_a_wrong_metric_is_named_with_the_task_s_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METRICS)
    file = tmp_path / "task.yaml"
    for name, message in (
        ("mine.py:undecorated", r"task.yaml: metric: .*is no metric: it is not decorated"),
        ("mine.py:lenght", "has no 'lenght'. Did you mean 'length'"),
        ("gone.py:length", f"There is no file {tmp_path}/gone.py"),
        ("acuracy", "No metric is called 'acuracy'. Did you mean 'accuracy'"),
    ):
        content = {"source": {"file": "rows.jsonl"}, "prompt": "{input}", "metric": name}
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(UsageError, match=message):
            load_task(file)


def _predictions(responses: list[str]) -> list[Prediction]:
    return [Prediction(str(n), r, "read", "abcd", 0.0) for n, r in enumerate(responses)]


def test_metrics_of_rows_and_of_sums_have_bootstrap_intervals_and_pairs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METRICS)
    lengths = np.array([n % 7 for n in range(40)])
    first = _predictions(["x" * n for n in lengths])
    second = _predictions(["x" * (n - n % 2) for n in lengths])
    draws = np.random.default_rng(5).integers(0, 40, (RESAMPLES, 40))  # an oracle of its own draws
    for name, per_row in (("length", np.minimum(1, lengths / 4)), ("corpus_length", lengths / 4)):
        one = score(first, f"{tmp_path}/mine.py:{name}")
        assert one.value == pytest.approx(per_row.mean())
        expected = np.quantile(per_row[draws].mean(axis=1), [0.025, 0.975])
        assert [one.low, one.high] == pytest.approx(expected, abs=0.02)
        result = paired(one, score(second, f"{tmp_path}/mine.py:{name}"))
        # All was read alike; what differs is what the metric sees.
        assert result.p_value < 0.05
        assert result.value > 0
    assert score(first[:1], f"{tmp_path}/mine.py:corpus_length").value == 0
    (samples,) = resample([score(first, f"{tmp_path}/mine.py:corpus_length")])
    assert samples.shape == (RESAMPLES,)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("return 1.5", UsageError, "has the credit 1.5, and m needs a number from 0 to 1"),
        ("return float('nan')", StarmergeError, "returns nan for row '0'. It must return finite"),
        ("return 'good'", StarmergeError, "returns 'good' for row '0'. It must return finite"),
        ("return None", StarmergeError, "returns None for row '0'. It must return finite"),
        ("return [0.5, '1']", StarmergeError, r"returns \[0.5, '1'\] for row '0'. It must return"),
        ("return row.gone", StarmergeError, "failed at row '0': AttributeError"),
    ],
)
def test_a_metric_that_fails_is_named_with_the_row(
    tmp_path: Path, source: str, kind: type[Exception], message: str
) -> None:
    head = "from starmerge_models.evaluation.scoring.metrics import metric\n"
    (tmp_path / "m.py").write_text(f"{head}@metric('m')\ndef m(row):\n    {source}\n")
    with pytest.raises(kind, match=message):
        score(_predictions(["a", "b"]), f"{tmp_path}/m.py:m")


def test_a_metric_of_sums_that_fails_is_named() -> None:
    with pytest.raises(
        UsageError, match="so does the metric starmerge_models.evaluation.scoring.metrics"
    ):
        metric("f1")(len)  # type: ignore[arg-type]


def test_a_task_of_a_file_and_what_is_wrong_with_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from starmerge_models.evaluation.tasks.task import Task\n"
        "quiz = Task(name='quiz', source={'file': 'rows.jsonl'}, prompt='{input}')\n"
        "number = 3\n"
    )
    assert find_task(f"{tmp_path}/mine.py:quiz").name == "quiz"
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "base: org/base\ntasks: ['mine.py:quiz', demo/past]\nmodels: {quiz: org/quiz}\n"
    )
    assert [find_task(name).name for name in load_suite(suite).tasks] == ["quiz", "past"]
    for name, message in (
        (f"{tmp_path}/mine.py:number", "is no task: it is of the type int, and a task is a Task"),
        (f"{tmp_path}/mine.py:quizz", "has no 'quizz'. Did you mean 'quiz'"),
        (f"{tmp_path}/mine.py", "Of a file say which"),
        (f"{tmp_path}/gone.py:quiz", "There is no file"),
    ):
        with pytest.raises(UsageError, match=message):
            find_task(name)


# Installed packages, each in a process of its own.


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path / "site"


def _group(**offers: str) -> dict[str, dict[str, str]]:
    return {"starmerge_models.methods": offers}


def test_a_package_that_is_added_or_removed_while_python_runs_is_noticed(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    os.utime(site, (0, 0))  # the clock of a file system may tell no two moments apart
    assert not METHODS.offers("added_later")
    install(site, "later", {}, _group(added_later="later:Later"))
    assert METHODS.offers("added_later")
    (site / "later-1.2.3.dist-info").rename(tmp_path / "removed")
    os.utime(site, (1, 1))
    assert not METHODS.offers("added_later")


def test_a_method_of_a_package_merges_and_the_report_has_its_version(
    starmerge: Run, tiny_base: Path, make_adapter: MakeAdapter, site: Path, tmp_path: Path
) -> None:
    install(site, "half-sum", {"halves": HEAD + METHOD}, _group(half_sum="halves:HalfSum"))
    one, two, out = make_adapter("one", seed=1), make_adapter("two", seed=2), tmp_path / "out"
    command = ("merge", tiny_base, one, two, "-m", "star+half_sum", "-o", out)
    done = starmerge(*command, site=site)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "merge_report.json").read_text())
    assert report["versions"]["half-sum"] == "1.2.3"
    assert report["recipe"]["method"] == "star+half_sum"
    origin = {"half_sum": {"package": "half-sum", "version": "1.2.3"}}
    assert report["recipe"]["plugins"] == origin
    card = (out / "README.md").read_text()
    (tmp_path / "recipe.yaml").write_text(card.partition("```yaml")[2].partition("```")[0])

    gone = starmerge("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "3")
    assert gone.returncode == 2
    assert "No method is called 'half_sum'" in gone.stderr
    (site / "half_sum-1.2.3.dist-info").rename(site / "half_sum-1.3.0.dist-info")
    metadata = site / "half_sum-1.3.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.2.3", "1.3.0"))
    newer = starmerge("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "3", site=site)
    assert newer.returncode == 2
    assert "was package half-sum, version 1.2.3 when the recipe was made" in newer.stderr

    shown = starmerge("methods", "half_sum", site=site).stdout
    assert "half_sum: merge, of the package half-sum 1.3.0" in shown
    assert "-p alpha=0.5 (number > 0): factor of the sum" in shown
    listed = json.loads(starmerge("methods", "--json", site=site).stdout)
    origins = {method["name"]: method["origin"] for method in listed}
    assert origins["half_sum"] == {"package": "half-sum", "version": "1.3.0"}
    assert origins["star"] is None


def test_broken_packages_are_named_and_break_nothing_else(
    starmerge: Run, tiny_base: Path, make_adapter: MakeAdapter, site: Path, tmp_path: Path
) -> None:
    good = HEAD + METHOD
    install(site, "good", {"good": good}, _group(half_sum="good:HalfSum"))
    install(
        site,
        "bad",
        {"bad": "import not_there\n", "other": good.replace("half_sum", "b"), "plain": "X = 3\n"},
        _group(
            broken="bad:X", gone="nowhere:X", lost="plain:Y", number="plain:X", a="other:HalfSum"
        ),
    )
    listed = starmerge("methods", site=site)
    assert listed.returncode == 0
    assert "half_sum" in listed.stdout
    assert "star" in listed.stdout
    for name, reason in (
        ("broken", "ModuleNotFoundError: No module named 'not_there'"),
        ("gone", "ModuleNotFoundError: No module named 'nowhere'"),
        ("lost", "AttributeError: module 'plain' has no attribute 'Y'"),
        ("number", "plain:X: it is of the type int, and a method is a class"),
        ("a", "other:HalfSum: it calls itself 'b', and its entry point must have that name"),
    ):
        assert re.search(f"The method '{name}' of the package bad 1.2.3 .*{reason}", listed.stderr)
    asked = starmerge("methods", "broken", site=site)
    assert asked.returncode == 1
    assert "No module named 'not_there'. Mend the package or uninstall it." in asked.stderr
    assert "Traceback" not in asked.stderr
    adapter = make_adapter("adapter")
    done = starmerge("merge", tiny_base, adapter, "-o", tmp_path / "out", site=site)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.count("bad")


def test_a_name_that_two_define_is_refused_with_both_origins(
    starmerge: Run, site: Path, file: Path
) -> None:
    for package in ("first", "second"):
        install(site, package, {package: HEAD + METHOD}, _group(half_sum=f"{package}:HalfSum"))
    third = HEAD + METHOD.replace("half_sum", "star")
    install(site, "third", {"third": third}, _group(star="third:HalfSum"))
    both = "the package first 1.2.3 and the package second 1.2.3 have one of that name"
    listed = starmerge("methods", site=site)
    assert both in listed.stderr
    assert "'star' is refused: starmerge and the package third 1.2.3 have one" in listed.stderr
    assert "arXiv 2502.10339" in starmerge("methods", "star", site=site).stdout
    clash = starmerge("methods", f"{file}:HalfSum", site=site)
    assert clash.returncode == 2
    assert "calls itself 'half_sum', and so does the method of the package first" in clash.stderr


def test_tasks_and_metrics_of_packages(
    starmerge: Run, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        METRICS
        + "from starmerge_models.evaluation.tasks.task import Task\n"
        + "quiz = Task(name='quiz', source={'file': 'rows.jsonl'}, prompt='{input}', "
        + "metric='length', description='Which?')\n"
        + "past = Task(name='past', source={'file': 'rows.jsonl'}, prompt='{input}')\n"
    )
    offers = {
        "starmerge_models.tasks": {"quiz": "quizzes:quiz", "past": "quizzes:past"},
        "starmerge_models.metrics": {"length": "quizzes:length"},
    }
    install(site, "quizzes", {"quizzes": source}, offers)
    shown = starmerge("tasks", "quiz", site=site)
    assert yaml.safe_load(shown.stdout)["metric"] == "length"
    monkeypatch.setenv("COLUMNS", "200")
    listed = starmerge("tasks", site=site)
    assert "Which? (of the package quizzes 1.2.3)" in listed.stdout
    assert "'past' is refused: starmerge and the package quizzes 1.2.3" in listed.stderr
    assert yaml.safe_load(starmerge("tasks", "past", site=site).stdout)["description"]


def test_packages_are_loaded_when_they_are_asked_for_alone(starmerge: Run, site: Path) -> None:
    source = "import pathlib\npathlib.Path(__file__).with_name('loaded').touch()\n"
    install(site, "half-sum", {"halves": HEAD + source + METHOD}, _group(half_sum="halves:HalfSum"))
    for command in (("--help",), ("methods", "star")):
        assert starmerge(*command, site=site).returncode == 0
    unknown = starmerge("methods", "half_sun", site=site)
    assert "Did you mean 'half_sum'?" in unknown.stderr
    assert not (site / "loaded").exists()
    assert starmerge("methods", "half_sum", site=site).returncode == 0
    assert (site / "loaded").exists()
