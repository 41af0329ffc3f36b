"""The seam of executors: work that is done elsewhere gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import starmerge_models as sm
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.plan import Plan, make_plan
from starmerge_models.merging.ranks import rank_costs
from starmerge_models.recipe import make_recipe
from tests.conftest import MakeAdapter, MakeFinetune, MakeMetric
from tests.forks import tree
from tests.merging.executors.processes import Processes

_OWN = '''
from starmerge_models.methods.method import Merge, method
from starmerge_models.methods.memory import total_bytes, total_shape
from starmerge_models.deltas import total

class Norm:
    def __init__(self, value): self.value = value

@method("by_norm")
class ByNorm(Merge):
    """Weigh by the norm over the model."""
    def survey(self, walk):
        def look(deltas, tensor):
            return Norm(sum(delta.frobenius() for delta in deltas))
        return sum(found.value for found in walk(look))
    def merge(self, deltas, tensor, survey):
        return total([delta.scaled(1 / survey) for delta in deltas])
    def memory(self, tensor): return total_bytes(tensor)
    def result(self, tensor): return total_shape(tensor)
'''

_CASES = {
    "model": ("star+ties", {"star.eta": 60}, "model"),
    "adapter": ("average", {}, "adapter"),
    "unified": ("emr", {}, "unified"),
    "plugin": ("own.py:ByNorm", {}, "model"),
    "post-step": ("shares+own_response", {}, "model"),
    "random": ("dare+linear", {"dare.seed": 3}, "model"),
}


def _plan(
    base: Path,
    models: list[Path],
    output: Path,
    method: str,
    parameters: Any,
    kind: str,
    metric: Path | None = None,
) -> Plan:
    recipe = make_recipe(
        {
            "base": str(base),
            "models": [{"path": str(path), "name": path.name} for path in models],
            "method": method,
            "parameters": parameters,
            "output": {"kind": kind},
            "metric": None if metric is None else str(metric),
        }
    )
    return make_plan(recipe, output)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Two processes for all tests."""
    executor = Processes()
    yield executor
    executor.stop()


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("full", [False, True])
def test_other_processes_write_the_same_bytes(
    case: str,
    full: bool,
    processes: Processes,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(_OWN)
    method, parameters, kind = _CASES[case]
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    if full and kind != "adapter":
        models = [make_adapter("a"), make_finetune("c", seed=2)]
    outputs = []
    for executor in (Threads(1), processes):
        # The card has the folder's name, so both are called the same.
        output = tmp_path / type(executor).__name__ / "out"
        result = run(_plan(tiny_base, models, output, method, parameters, kind), executor)
        outputs.append(tree(result.path))
        assert not result.resumed
    assert outputs[0] == outputs[1]
    report = json.loads(outputs[0]["merge_report.json"])
    assert report["unchanged"] == []


def test_a_metric_is_read_by_other_processes(
    processes: Processes,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_metric: MakeMetric,
    tmp_path: Path,
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    file = make_metric(tasks=["a", "b"])
    outputs = []
    for executor in (Threads(1), processes):
        output = tmp_path / type(executor).__name__ / "out"
        plan = _plan(tiny_base, models, output, "covariance", {}, "model", file)
        outputs.append(tree(run(plan, executor).path))
    assert outputs[0] == outputs[1]


def test_errors_of_other_processes_are_those_of_the_merge(
    processes: Processes, tiny_base: Path, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    plan = _plan(
        tiny_base,
        [make_finetune("a", scale=float("nan"))],
        tmp_path / "out",
        "average",
        {},
        "model",
    )
    with pytest.raises(sm.StarmergeError, match="has a NaN"):
        run(plan, processes)
    assert not (tmp_path / "out").exists()


def test_ranks_are_measured_by_other_processes(
    processes: Processes, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    plan = _plan(tiny_base, models, tmp_path / "out", "star", {}, "adapter")
    assert rank_costs(plan, processes) == rank_costs(plan, Threads(1))
