"""The memory that methods say they need: against what they take, and by its own sense."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank, matrix_shape
from starmerge_models.methods import METHODS, Method, Transform, make_pipeline
from starmerge_models.methods.kinds.spectral import CoreSpaceMerge
from starmerge_models.methods.memory import DeltaShape, InputsShape, TensorShape
from tests.merge_one import merge_one
from tests.oracles import samples

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHAINS = [
    *(name for name in sorted(METHODS) if name != "auto"),
    "star+ties",
    "denoise+shares",
    "pico+tsv_m+mean_norm",
]

SHARING = ("dc_merge", "tsv_m", "pico+tsv_m+mean_norm")
"""Chains in which each task gives fewer triplets, the more tasks there are."""


def known(shape=(64, 48), ranks=(4, 4), *, tasks=None, **others):
    """Return what is known of a tensor of adapters and, with the rank None, full fine-tunes."""
    deltas = tuple(map(DeltaShape, ranks))
    return TensorShape(shape, False, deltas, tasks=tasks or len(ranks), **others)


def chain_of(name):
    weight = {"settings": [{"parameter": "weight", "value": 1.0}]}
    return make_pipeline(name, weight if name == "mergekit" else None)


_MEASURE = """if True:
    import json, sys
    import memory

    for arguments in json.load(sys.stdin):
        sys.argv[1:] = arguments
        print("exit code", memory.main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_methods_take_no_more_than_they_say():
    """Measured by the system, with 2 MB for what a process takes besides.

    Every method, and those that share of many task vectors: adapters, whose ranks add up to more
    than both sides and which keep their factors, and full fine-tunes among them.
    """
    every = ["--shapes", "288,224", "--kinds", "low-rank", "dense"]
    many = ["--shapes", "256,352", "--only", "shares", "tsv_m", "tsv_m+own_response"]
    adapters = [*many, "--tasks", "40", "--kinds", "low-rank", "low-rank, whitened"]
    mixed = [*many, "--tasks", "12", "--kinds", "mixed"]
    arguments = [["--slack", "2", *cases] for cases in (every, adapters, mixed)]
    finished = subprocess.run(
        [sys.executable, "-c", _MEASURE],
        cwd=_BENCHMARKS,
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    succeeded = finished.stdout.count("exit code 0\n")
    assert succeeded == len(arguments), finished.stdout + finished.stderr
    assert all(f"| {name} | dense | " in finished.stdout for name in METHODS if name != "auto")


@pytest.mark.parametrize("name", [name for name in METHODS if name != "auto"])
def test_a_method_of_ours_tells_its_memory_itself_or_by_its_base_class(name):
    assert METHODS[name].memory is not Method.memory
    if issubclass(METHODS[name], CoreSpaceMerge):
        assert METHODS[name].matrix_memory is not CoreSpaceMerge.matrix_memory
    if issubclass(METHODS[name], Transform):
        assert METHODS[name].result is not Transform.result


@pytest.mark.parametrize("name", [name for name in CHAINS if name not in SHARING])
@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(400, 5000),
    n=st.integers(400, 5000),
    ranks=st.lists(st.integers(0, 64), min_size=1, max_size=5),
    is_dense=st.booleans(),
)
def test_another_task_needs_no_less(name, m, n, ranks, is_dense):
    """Of adapters whose ranks add up to less than a side, or of square dense matrices."""
    shape, own = ((m, m), [None] * len(ranks)) if is_dense else ((m, n), ranks)
    chain = chain_of(name)
    assert chain.memory(known(shape, [*own, own[0]])) >= chain.memory(known(shape, own)) >= 0


@pytest.mark.parametrize("name", CHAINS)
def test_a_larger_tensor_needs_no_less(name):
    chain = chain_of(name)
    for ranks in ((8, 8, 8), (None, None, None), (8, None, 8)):
        sizes = [(64, 96), (128, 96), (128, 192), (640, 960)]
        needs = [chain.memory(known(size, ranks)) for size in sizes]
        assert needs == sorted(needs)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("kind", ["low-rank", "dense", "mixed"])
def test_what_is_made_is_as_dense_as_it_was_said(name, kind):
    """Where a chain says that its result has factors it has, and no more of them."""
    deltas = samples.task_deltas(kind, 40, 30)
    count = {"slerp": 1, "nuslerp": 2}.get(name, len(deltas))
    chain = chain_of(name)
    if chain.needs_moments or name == "lines":
        return
    deltas = deltas[:count]
    ranks = [delta.rank if isinstance(delta, LowRank) else None for delta in deltas]
    merged = chain.result(known((40, 30), ranks))
    base = samples.task_deltas("dense", 40, 30)[0].tensor
    found = merge_one(chain, deltas, base=base).delta
    if merged.rank is None:
        assert isinstance(found, Dense | LowRank)
    else:
        assert isinstance(found, LowRank)
        assert found.rank <= merged.rank


@pytest.mark.parametrize("name", [name for name in CHAINS if chain_of(name).uses_metric])
def test_whitening_is_counted(name):
    rows = InputsShape(size=48, text=32)
    plain = chain_of(name).memory(known())
    assert chain_of(name).memory(known(inputs=rows)) >= plain + 24 * 48**2


def test_moments_of_the_tasks_are_counted():
    moments = [InputsShape(48, None, (rows,) * 2) for rows in (8, 16, 48)]
    needs = [chain_of("regmean").memory(known(inputs=inputs)) for inputs in moments]
    assert needs == sorted(needs)
    assert needs[0] > chain_of("regmean").memory(known())


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "star", "denoise", "knots", "shares"])
@pytest.mark.parametrize("others", [{"shape": (4096,)}, {"is_embedding": True}])
def test_what_is_averaged_needs_no_more_than_an_average(name, others):
    tensor = replace(known((4096, 64), (None, None)), **others)
    assert chain_of(name).memory(tensor) == chain_of("average").memory(tensor)


def test_an_average_of_stored_tensors_takes_nothing_before_it_is_added():
    assert chain_of("average").memory(known(ranks=(None, None))) == 0
    assert chain_of("task_arithmetic").memory(known(ranks=(None, None))) == 0


def test_computed_matrices_are_held_by_those_that_list_them_alone():
    m, n = matrix_shape((64, 48))
    computed = (DeltaShape(None, 4 * m * n),) * 8
    few = (DeltaShape(None, 4 * m * n),) * 2
    tensor = replace(known(), deltas=computed, tasks=8)
    small = replace(known(), deltas=few, tasks=2)
    assert chain_of("average").memory(tensor) == chain_of("average").memory(small)
    assert chain_of("ties").memory(tensor) >= chain_of("ties").memory(small) + 6 * 4 * m * n


@pytest.mark.parametrize("name", ["shares", "tsv_m", "tsv_m+own_response"])
def test_thousands_of_adapters_need_their_factors_and_no_matrices(name):
    m, n, r, tasks = 512, 1408, 16, 2000
    factors = 8 * r * (m + n) * tasks
    assert factors <= chain_of(name).memory(known((m, n), (r,) * tasks)) <= 2 * factors


def test_a_dense_spectral_merge_counts_its_float64_matrices():
    """Those of all tasks, and the SVD of one, which LAPACK makes of a copy."""
    tensor = known((1000, 1000), (None,) * 4)
    assert chain_of("iso_c").memory(tensor) >= 8 * 1000**2 * (4 + 1 + 7)
    assert chain_of("average").memory(tensor) < chain_of("iso_c").memory(tensor)
