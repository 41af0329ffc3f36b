"""EMR-Merging against its float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models import UsageError, merge_state
from starmerge_models.deltas import Dense
from starmerge_models.methods import make_pipeline
from starmerge_models.methods.emr import Emr, emr, masks_of
from starmerge_models.methods.kinds import entrywise
from starmerge_models.methods.method import Deltas, TensorContext
from tests.oracles import bounds, samples
from tests.oracles import emr as oracle


def entries(delta):
    """What entrywise methods see of a delta, as a float64 matrix."""
    return delta.entries().double().numpy()


def tiny(*values):
    return Dense(torch.tensor(values))


def models_of(states):
    """The states as the oracle wants them: arrays, zeros where a task leaves a tensor alone."""
    zeros = {name: np.zeros(delta.shape) for state in states for name, delta in state.items()}
    return [zeros | {name: entries(delta) for name, delta in state.items()} for state in states]


def assert_is_emr(found, states):
    models = models_of(states)
    unified, masks, rescalers = oracle.emr(models)
    assert set(found.tau_uni) == set(unified)
    for name, tau_uni in found.tau_uni.items():
        assert tau_uni.dtype == torch.float32
        np.testing.assert_array_equal(tau_uni.double().numpy(), unified[name])
    count = sum(x.size for x in unified.values())
    assert len(found.masks) == len(found.rescalers) == len(states)
    for t, state in enumerate(states):
        assert set(found.masks[t]) == set(state)
        for name, mask in masks[t].items():
            kept = found.masks[t][name].numpy() if name in state else np.zeros_like(mask)
            np.testing.assert_array_equal(kept, mask)
        # Two sums of positive numbers, here and in the oracle, and a division.
        allowed = bounds.gamma(4 * count + 2, bounds.U64) * rescalers[t]
        assert abs(found.rescalers[t] - rescalers[t]) <= allowed


def states_of(kind, dtype=torch.float32):
    """Four tasks, three tensors; one task leaves a matrix alone, one has a vector alone."""
    first = samples.task_deltas(kind, dtype=dtype)
    second = samples.task_deltas(kind, 5, 12, dtype=dtype, seed=100)
    states = [{"first": a, "second": b} for a, b in zip(first, second, strict=True)]
    del states[2]["first"]
    states[1]["bias"] = samples.dense(7, seed=9, dtype=dtype)
    return states


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_emr_is_the_reference(kind, dtype):
    states = states_of(kind, dtype)
    assert_is_emr(emr(states), states)


@samples.SEARCH
@given(samples.task_lists(), samples.task_lists())
def test_every_shape_rank_scale_and_dtype(first, second):
    states = [{} for _ in range(max(len(first), len(second)))]
    for name, deltas in (("first", first), ("second", second)):
        for state, delta in zip(states, deltas, strict=False):
            state[name] = delta
    assert_is_emr(emr(states), states)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (0, 3), (3, 0), (4, 2, 3, 3)])
def test_tensors_of_every_number_of_dimensions(shape):
    states = [
        {"x": samples.dense(*shape, seed=t), "y": samples.dense(3, 3, seed=t + 9)} for t in range(3)
    ]
    assert_is_emr(emr(states), states)


def test_entries_that_cancel_or_tie():
    states = [{"x": samples.dense(40, 30, seed=t, entries=samples.integers)} for t in range(4)]
    found = emr(states)
    sums = sum(entries(state["x"]) for state in states)
    cancelled = (sums == 0) & (entries(states[0]["x"]) != 0)
    assert cancelled.sum() > 50
    assert not found.tau_uni["x"].numpy()[cancelled].any()
    assert not any(masks["x"].numpy()[cancelled].any() for masks in found.masks)
    assert_is_emr(found, states)


def test_by_hand():
    found = emr([{"x": tiny([3.0, -1.0, 2.0])}, {"x": tiny([1.0, -4.0, -2.0])}])
    assert found.tau_uni["x"].tolist() == [[3.0, -4.0, 0.0]]
    assert [masks["x"].tolist() for masks in found.masks] == [[[True, True, False]]] * 2
    assert found.rescalers == [6 / 7, 7 / 7]


def test_rescalers_count_entries_not_tensors():
    """The defining repository takes the mean of each tensor: then the bias would count as much."""
    big, small = torch.ones(100, 100), torch.ones(1)
    states = [{"W": Dense(big), "b": Dense(8 * small)}, {"W": Dense(3 * big), "b": Dense(small)}]
    assert emr(states).rescalers == [10_008 / 30_008, 30_001 / 30_008]


@pytest.mark.parametrize("kind", samples.KINDS)
def test_every_task_keeps_its_l1_norm(kind):
    states = states_of(kind)
    found = emr(states)
    for t, model in enumerate(models_of(states)):
        norm = oracle.absolute_sum(model)
        kept = sum(
            float(mask.double().mul(found.tau_uni[name]).abs().sum())
            for name, mask in found.masks[t].items()
        )
        assert found.rescalers[t] * kept == pytest.approx(norm, rel=1e-13)


@samples.SEARCH
@given(samples.any_deltas(), samples.any_deltas())
def test_one_task_gets_back_itself(first, second):
    found = emr([{"x": first, "y": second}])
    for name, delta in (("x", first), ("y", second)):
        np.testing.assert_array_equal(found.tau_uni[name].double().numpy(), entries(delta))
        np.testing.assert_array_equal(found.masks[0][name].numpy(), entries(delta) != 0)
    is_zero = not (entries(first).any() or entries(second).any())
    assert found.rescalers == [0.0 if is_zero else 1.0]


def test_equal_tasks_get_back_themselves():
    delta = samples.low_rank(6, 5, 2)
    found = emr([{"x": delta}] * 3)
    np.testing.assert_array_equal(found.tau_uni["x"].double().numpy(), entries(delta))
    assert found.rescalers == [1.0] * 3


def test_a_task_that_is_zero_or_agrees_nowhere_gets_the_base():
    zero, loud, quiet = torch.zeros(3, 3), 5 * torch.ones(3, 3), -torch.ones(3, 3)
    found = emr([{"x": Dense(zero)}, {"x": Dense(loud)}, {"x": Dense(quiet)}, {}])
    assert found.rescalers == [0.0, 1.0, 0.0, 0.0]
    assert not found.masks[0]["x"].any()
    assert found.masks[1]["x"].all()
    assert not found.masks[2]["x"].any()
    assert found.masks[3] == {}
    assert emr([{"x": Dense(zero)}] * 2).rescalers == [0.0, 0.0]


def test_entries_so_small_that_their_product_is_zero_still_agree():
    found = emr([{"x": tiny([1e-30, 1e-40])}, {"x": tiny([2e-30, -3e-40])}])
    assert found.masks[0]["x"].tolist() == [[True, False]]
    assert found.masks[1]["x"].tolist() == [[True, True]]


def test_a_unified_vector_that_was_rounded_is_what_masks_and_sums_see():
    tau = {0: tiny([1.0, 1e-9]), 1: tiny([1.0 + 2**-12, 1e-9])}
    tau_uni = torch.tensor([[1.0 + 2**-12, 1e-9]]).half()
    found = dict(masks_of(Deltas.of(tau), tau_uni))
    for masked in found.values():
        assert masked.M.tolist() == [[True, False]]  # 1e-9 is zero in float16
        assert masked.masked_norm == 1.0
    assert found[1].norm == 1.0 + 2**-12 + float(torch.tensor(1e-9))


@samples.SEARCH
@given(samples.task_lists(), st.randoms())
def test_the_order_of_the_tasks_does_not_matter(deltas, random):
    order = list(range(len(deltas)))
    random.shuffle(order)
    found = emr([{"x": delta} for delta in deltas])
    turned = emr([{"x": deltas[t]} for t in order])
    # In another order the float64 sum of entries that nearly cancel may have another sign.
    sums = sum(map(entries, deltas))
    clear = np.abs(sums) > bounds.gamma(8, bounds.U64) * sum(np.abs(entries(d)) for d in deltas)
    clear |= sums == 0
    for place, t in enumerate(order):
        ours, theirs = found.masks[t]["x"].numpy(), turned.masks[place]["x"].numpy()
        np.testing.assert_array_equal(ours[clear], theirs[clear])
    ours, theirs = found.tau_uni["x"].numpy(), turned.tau_uni["x"].numpy()
    np.testing.assert_array_equal(ours[clear], theirs[clear])


@samples.SEARCH
@given(samples.task_lists(), st.sampled_from([-1.0, 2.0, -0.25]))
def test_negated_and_scaled_tasks_give_the_same_masks_and_rescalers(deltas, factor):
    found = emr([{"x": delta} for delta in deltas])
    scaled = emr([{"x": delta.scaled(factor)} for delta in deltas])
    np.testing.assert_array_equal(
        scaled.tau_uni["x"].double().numpy(), factor * found.tau_uni["x"].double().numpy()
    )
    assert scaled.rescalers == found.rescalers
    for ours, theirs in zip(found.masks, scaled.masks, strict=True):
        assert torch.equal(ours["x"], theirs["x"])


@pytest.mark.parametrize("size", [1, 24, 100])
def test_panels_of_every_size_give_the_same(monkeypatch, size):
    states = states_of("dense")
    before = emr(states)
    monkeypatch.setattr(entrywise, "PANEL_ENTRIES", size)
    after = emr(states)
    for name in before.tau_uni:
        assert torch.equal(before.tau_uni[name], after.tau_uni[name])
    for ours, theirs in zip(before.masks, after.masks, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert after.rescalers == pytest.approx(before.rescalers, rel=1e-14)


def test_the_number_of_threads_changes_nothing():
    states = [{"x": samples.dense(300, 400, seed=t)} for t in range(3)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = emr(states)
        torch.set_num_threads(2)
        two = emr(states)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.tau_uni["x"], two.tau_uni["x"])
    assert one.rescalers == two.rescalers


def test_what_it_merges_is_the_unified_vector():
    deltas = samples.task_deltas("mixed")
    context = TensorContext("x", (9, 7), False, tasks=("a", "b", "c", "d"), weights=(1.0,) * 4)
    merged = Emr().merge(Deltas.of(dict(enumerate(deltas))), context, None)
    expected = oracle.unified_tensor([entries(delta) for delta in deltas])
    np.testing.assert_array_equal(samples.values(merged), expected)


def test_transforms_may_come_before_it_and_nothing_after():
    assert make_pipeline("star+emr").name == "star+emr"
    for step in ("svc", "scale", "own_response"):
        with pytest.raises(UsageError, match=f"emr makes a model for each task, and {step}"):
            make_pipeline(f"emr+{step}")


@pytest.mark.parametrize("weight", [2.0, 0.0, -1.0])
def test_refuses_weights(weight):
    with pytest.raises(UsageError, match=f"emr: b has the weight {weight:g}"):
        Emr().check(["a", "b"], [1.0, weight], ["x"])
    Emr().check(["a", "b"], [1.0, 1.0], ["x"])


def test_has_no_single_update_of_deltas_in_memory():
    with pytest.raises(UsageError, match=r"a model for each task.*starmerge_models\.methods\.emr"):
        merge_state([{"x": samples.dense(2, 2)}], "emr")
