"""What the methods that look at entries have in common."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starmerge_models import merge_state
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.methods import make_pipeline
from starmerge_models.methods.kinds import entrywise
from starmerge_models.methods.kinds.entrywise import entries_of, panels, task_sum
from tests.oracles import models, samples

SEARCH = settings(samples.SEARCH, max_examples=15)  # for each chain
CHAINS = {
    "ties": ("ties", {"k": 30}),
    "ties in each tensor": ("ties", {"k": 30, "scope": "local", "zero_sign": "zero"}),
    "untrimmed ties": ("ties", {"k": 100}),
    "tall masks": ("tall_masks", {"alpha": 0.75, "min_tasks": 1}),
    "scaled tall masks": ("tall_masks", {"lambda": 0.6, "mtl": "scaled", "min_tasks": 1}),
    "breadcrumbs": ("breadcrumbs", {"beta": 40, "gamma": 80}),
    "trim": ("trim+task_arithmetic", {"k": 30, "alpha": 1}),
    "trim in each tensor": ("trim+task_arithmetic", {"k": 30, "scope": "local", "alpha": 1}),
}
each_chain = pytest.mark.parametrize(("method", "parameters"), CHAINS.values(), ids=CHAINS)


def written(given, method, parameters, weights=None):
    """The bytes of all merged entries."""
    merged = merge_state(given, make_pipeline(method, parameters), weights=weights)
    return {name: delta.to_dense().numpy().tobytes() for name, delta in merged.items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, values in right.items():
        np.testing.assert_array_equal(left[name], values, err_msg=name)


@each_chain
@SEARCH
@given(models.many(), st.data())
def test_the_order_of_the_tasks_means_nothing(method, parameters, given, data):
    order = data.draw(st.permutations(range(len(given))))
    permuted = models.merge([given[t] for t in order], method, parameters)
    assert_equal(permuted, models.merge(given, method, parameters))


@each_chain
@SEARCH
@given(models.many(), st.integers(-30, 30), st.sampled_from([1, -1]))
def test_powers_of_two_and_signs_go_through(method, parameters, given, exponent, sign):
    factor = sign * 2.0**exponent
    merged = models.merge(given, method, parameters)
    expected = {name: factor * values for name, values in merged.items()}
    assert_equal(models.merge(models.scaled(given, factor), method, parameters), expected)


@each_chain
@SEARCH
@given(models.many())
def test_the_shapes_of_tensors_mean_nothing(method, parameters, given):
    merged = models.merge(given, method, parameters)
    expected = {name: values.reshape(1, -1) for name, values in merged.items()}
    assert_equal(models.merge(models.flattened(given), method, parameters), expected)


@each_chain
@SEARCH
@given(models.many(), st.data())
def test_a_task_of_zeros_changes_nothing(method, parameters, given, data):
    place = data.draw(st.integers(0, len(given)))
    zero = data.draw(st.sampled_from([{}, models.zeroed(given[0])]))
    with_zero = models.merge([*given[:place], zero, *given[place:]], method, parameters)
    assert_equal(with_zero, models.merge(given, method, parameters))


@each_chain
@pytest.mark.parametrize("weights", [None, models.WEIGHTS])
def test_zeros_alone_stay_zeros(method, parameters, weights):
    zero = {
        "full": Dense(torch.zeros(3, 4)),
        "adapter": LowRank(torch.zeros(4, 2), torch.ones(2, 3)),
        "vector": Dense(torch.zeros(5)),
        "scalar": Dense(torch.tensor(0.0)),
    }
    for name, values in models.merge([zero] * 4, method, parameters, weights).items():
        np.testing.assert_array_equal(values, np.zeros(zero[name].shape))


@each_chain
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 3)])
def test_empty_tensors_stay_empty(method, parameters, shape):
    empty = {"empty": Dense(torch.zeros(shape))}
    alone = models.merge([empty, empty], method, parameters)
    assert alone["empty"].shape == empty["empty"].shape
    full = {"full": samples.dense(3, 4)}
    beside = models.merge([empty | full, full], method, parameters)
    assert_equal(beside, alone | models.merge([full, full], method, parameters))


@each_chain
def test_models_that_change_nothing_leave_nothing(method, parameters):
    assert models.merge([{}, {}], method, parameters) == {}


@each_chain
def test_the_inputs_are_left_alone(method, parameters):
    given = models.models("mixed")
    before = models.entries(given)
    models.merge(given, method, parameters, models.WEIGHTS)
    for left, right in zip(models.entries(given), before, strict=True):
        assert_equal(left, right)


def uneven(tasks=9, shape=(7, 5)):
    """Full models of which one entry may be 2⁸⁰ times that of another: their sums round."""
    generator = np.random.default_rng(5)
    return models.from_entries(
        *(
            {
                name: generator.standard_normal(shape) * 2.0 ** generator.integers(-40, 40, shape)
                for name in ("one", "two")
            }
            for _ in range(tasks)
        )
    )


@each_chain
@pytest.mark.parametrize("entries", [1, 3, 20, 100])
def test_the_size_of_the_panels_means_nothing(method, parameters, entries, monkeypatch):
    # Products of bfloat16 factors are exact in float64, whichever rows are taken together.
    mixed = models.models("mixed", dtype=torch.bfloat16)
    tied = models.models("mixed", entries=samples.integers)
    weights = [0.1, 0.2, -0.3, 0.7, 1.1, 0.9, 0.6, 1.3, 0.8]
    merges = [(mixed, None), (tied, None), (uneven(), weights)]
    at_once = [written(given, method, parameters, w) for given, w in merges]
    monkeypatch.setattr(entrywise, "PANEL_ENTRIES", entries)
    assert [written(given, method, parameters, w) for given, w in merges] == at_once


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@each_chain
@pytest.mark.usefixtures("_threads")
def test_the_number_of_threads_means_nothing(method, parameters):
    given = [
        {
            "full": samples.dense(300, 230, seed=t, dtype=torch.bfloat16),
            "adapter": samples.low_rank(250, 280, 5, seed=t, dtype=torch.bfloat16),
        }
        for t in range(3)
    ]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(written(given, method, parameters))
    assert found[0] == found[1]


def test_the_tasks_are_summed_in_their_order():
    tau = torch.tensor([1.0, 2.0**60, -(2.0**60), 3.0], dtype=torch.float64)
    assert float(task_sum(tau)) == 3.0
    assert float(task_sum(tau[[1, 2, 0, 3]])) == 4.0


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 64), (64, 3)])
def test_a_sum_over_tasks_does_not_depend_on_the_other_entries(shape):
    tau = samples.normal(40, *shape, seed=0, dtype=torch.float64)
    np.testing.assert_array_equal(task_sum(tau).numpy(), sum(tau.numpy()))


def test_a_sum_leaves_its_terms_alone():
    tau = samples.normal(3, 4, seed=0, dtype=torch.float64)
    before = tau.clone()
    task_sum(tau)
    assert torch.equal(tau, before)


@samples.SEARCH
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 5), st.integers(1, 20))
def test_panels_cover_each_row_once(m, n, tasks, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entrywise, "PANEL_ENTRIES", 100)
        found = [range(m)[rows] for rows in panels((m, n), tasks, step)]
    assert [row for rows in found for row in rows] == list(range(0, m, step))
    assert all(len(rows) * n * tasks <= 100 or len(rows) == 1 for rows in found)
    assert len(found) <= 1 or n * tasks * (len(found[0]) + 1) > 100


@pytest.mark.parametrize("kind", ["dense", "adapter"])
@pytest.mark.parametrize(("m", "step"), [(700, 1), (700, 3), (700, 10), (700, 11), (0, 3)])
def test_the_entries_of_every_so_manyth_row(kind, m, step, monkeypatch):
    monkeypatch.setattr(entrywise, "PANEL_ENTRIES", 60)
    delta = {
        "dense": samples.dense(m, 4, dtype=torch.bfloat16),
        "adapter": samples.low_rank(m, 4, 2, dtype=torch.bfloat16),
    }[kind]
    # 11 would leave fewer than 64 rows.
    expected = delta.entries()[:: step if step < 11 else 1]
    assert torch.equal(torch.cat([torch.empty(0, 4), *entries_of(delta, step)]), expected)
