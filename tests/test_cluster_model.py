"""The model of a cluster, on cases whose time can be told by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import distributed
import on_paper
from cluster_model import Cluster, Tensor, simulate
from synthetic import Llama, make_adapters, make_base, make_finetunes

from starmerge_models.merging.plan import make_plan
from starmerge_models.recipe import make_recipe

MB = 10**6
_HUGE = 10**9
"""Bytes that make each tensor a group of its own."""


def tensors(count: int, **changes: float) -> list[Tensor]:
    values = {"read": 0.0, "seconds": 0.0, "written": 0.0, "memory": _HUGE} | changes
    return [Tensor(**values)] * count


@pytest.mark.parametrize("nodes,cores,expected", [(1, 1, 24), (1, 4, 6), (3, 2, 4), (5, 1, 6)])
def test_cores_alone(nodes: int, cores: int, expected: float) -> None:
    found = simulate(tensors(12, seconds=2.0), Cluster(nodes, cores))
    # Whole rounds: 12 tensors on 5 cores take three rounds.
    assert found.seconds == pytest.approx(2.0 * math.ceil(12 / (nodes * cores)))
    assert found.seconds == pytest.approx(expected)
    assert found.groups == 12
    assert found.bottleneck == "processors"


def test_storage_that_all_share() -> None:
    work = tensors(16, read=100 * MB, written=50 * MB)
    alone = simulate(work, Cluster(1, 1, storage_read=100 * MB, storage_write=200 * MB))
    assert alone.seconds == pytest.approx(16 * (1 + 0.25))  # no reading beside the writing
    many = simulate(work, Cluster(4, 4, storage_read=100 * MB))
    assert many.seconds == pytest.approx(16)
    assert many.bottleneck == "storage, read"
    assert many.used == pytest.approx(1)
    out = simulate(work, Cluster(4, 4, storage_write=100 * MB))
    assert (out.seconds, out.bottleneck) == (pytest.approx(8), "storage, written")


def test_the_network_of_a_node_bounds_what_it_gets_of_the_storage() -> None:
    work = tensors(16, read=100 * MB)
    found = simulate(work, Cluster(4, 4, storage_read=10_000 * MB, network=100 * MB))
    assert found.seconds == pytest.approx(4)
    assert found.bottleneck == "network of the nodes"


def test_a_driver_that_serves_one_after_the_other() -> None:
    found = simulate(tensors(100, seconds=0.01), Cluster(10, 10, driver=0.5))
    assert found.seconds == pytest.approx(100 * 0.5 + 0.01)
    assert found.bottleneck == "driver"


def test_one_tensor_is_not_divided() -> None:
    work = [*tensors(20, seconds=1.0), *tensors(1, seconds=30.0, memory=2 * _HUGE)]
    found = simulate(work, Cluster(4, 4))
    # It is the last one, and begun before others as it is the largest.
    assert found.seconds == pytest.approx(30)
    assert found.bottleneck == "longest tensor"


def test_memory_lets_fewer_work_at_once() -> None:
    work = tensors(8, seconds=1.0)
    assert simulate(work, Cluster(1, 8, memory=2.5 * _HUGE)).seconds == pytest.approx(4)
    alone = simulate(work, Cluster(1, 8, memory=1))
    assert (alone.seconds, alone.bottleneck) == (pytest.approx(8), "memory")
    assert simulate(work, Cluster(2, 8, memory=1)).seconds == pytest.approx(4)


def test_small_tensors_share_a_group() -> None:
    work = tensors(640, seconds=0.001, memory=1000)
    found = simulate(work, Cluster(1, 2, driver=0.1))
    assert found.groups == 10
    assert found.seconds == pytest.approx(10 * 0.1 + 0.064)


@pytest.mark.parametrize("kind", ["adapters", "full fine-tunes"])
def test_the_simulated_merges_take_the_memory_that_a_plan_estimates(
    kind: str, tmp_path: Path
) -> None:
    model = Llama(hidden=64, intermediate=160, layers=1, vocabulary=96, key_value=32, head=16)
    make = make_adapters if kind == "adapters" else make_finetunes
    models = make(tmp_path / "models", model, 3)
    recipe = make_recipe(
        {
            "base": str(make_base(tmp_path / "base", model)),
            "models": [{"path": str(path), "name": name} for name, path in models.items()],
            "method": "star",
        }
    )
    plan = make_plan(recipe, tmp_path / "out")
    planned = {tensor.source.name: plan.memory_of(tensor) for tensor in plan.tensors}
    simulated = {
        name: distributed.memory_of(*matrix, kind, len(models))
        for name, matrix in zip(model.tensors, on_paper.matrices(model), strict=True)
    }
    assert simulated == planned
