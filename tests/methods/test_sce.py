"""SCE against its float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models import merge_state
from starmerge_models.deltas import Dense
from starmerge_models.errors import UsageError
from starmerge_models.methods import Sce, make_method
from starmerge_models.methods.kinds import entrywise
from tests.merge_one import merge_one
from tests.oracles import bounds, models, samples, sce, weights

TOPK = [1.0, 0.6, 0.29, 0.1, 0.0]


def entries(deltas):
    """What SCE sees: float32 entries."""
    return [delta.entries().double().numpy() for delta in deltas]


def assert_is_sce(found, given, topk=1.0, floor=1e-6):
    """The expected update, but for float64's rounding and one to float32."""
    want = sce.sce(given, topk, floor=floor)
    terms = np.sum(np.abs(given), axis=0)
    assert np.all(np.abs(found - want) <= weights.U32 * np.abs(want) + 64 * bounds.U64 * terms)


@pytest.mark.parametrize("topk", TOPK)
@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_sce_is_the_reference(kind, dtype, size, topk):
    deltas = weights.deltas(kind, size, dtype=dtype)
    assert_is_sce(weights.merged(Sce(select_topk=topk), deltas), entries(deltas), topk)


@pytest.mark.parametrize("floor", [0.0, 1e-6, 1e3])
def test_the_floor_decides_whether_all_count_alike(floor):
    deltas = weights.deltas("dense", 1e-5, 3)
    deltas[0] = deltas[0].scaled(4.0)
    found = weights.merged(Sce(floor=floor), deltas)
    assert_is_sce(found, entries(deltas), floor=floor)
    apart = np.abs(found - sce.sce(entries(deltas), floor=1.0)).max()
    assert (apart > 1e-6) == (floor == 0.0)


@samples.SEARCH
@given(models.many(), st.sampled_from(TOPK), st.data())
def test_the_order_of_the_tasks_means_nothing(drawn, topk, data):
    order = data.draw(st.permutations(range(len(drawn))))
    parameters = {"select_topk": topk}
    merged = models.merge(drawn, "sce", parameters)
    permuted = models.merge([drawn[t] for t in order], "sce", parameters)
    for name, values in merged.items():
        np.testing.assert_allclose(permuted[name], values, rtol=2 * weights.U32, atol=0)


@samples.SEARCH
@given(models.many())
def test_every_shape_dtype_and_task_that_leaves_a_tensor_alone(drawn):
    found, seen = models.merge(drawn, "sce", {"floor": 0}), models.entries(drawn)
    for name, values in found.items():
        assert_is_sce(values, [task[name] for task in seen], floor=0)


def test_tasks_that_leave_the_tensor_alone_count_in_the_variance():
    deltas = [Dense(torch.tensor([[4.0, 3.0, 1.0, 2.0]])), Dense(torch.tensor([[4.0, 0, 1, 0]]))]
    alone = weights.merged(Sce(select_topk=0.5), deltas)
    beside = weights.merged(Sce(select_topk=0.5), deltas, tasks=3)
    np.testing.assert_array_equal(alone, [[0, 3, 0, 0]])  # 1 of 2 that differ
    np.testing.assert_array_equal(beside, [[4, 3, 0, 0]])  # 2 of 4 that differ


def test_tasks_that_leave_the_tensor_alone_vary_from_the_others():
    deltas = [Dense(torch.tensor([[4.0, 3.0]])), Dense(torch.tensor([[4.0, -1.0]]))]
    found = weights.merged(Sce(select_topk=0.5), deltas, tasks=3)
    np.testing.assert_array_equal(found, [[4.0, 0.0]])  # 4, 4, 0 varies more than 3, -1, 0


def test_of_equal_variances_the_first_stay():
    deltas = [Dense(torch.tensor([[1.0, -1.0], [1.0, 1.0]])), Dense(torch.zeros(2, 2))]
    np.testing.assert_array_equal(
        weights.merged(Sce(select_topk=0.5), deltas), [[1.0, -1.0], [0.0, 0.0]]
    )


def test_where_tasks_cancel_the_positive_ones_win():
    deltas = [Dense(torch.tensor([[1.0, -2.0]])), Dense(torch.tensor([[-1.0, 2.0]]))]
    np.testing.assert_array_equal(weights.merged(Sce(), deltas), [[1.0, 2.0]])


def test_one_model_varies_from_nothing():
    delta = samples.dense(9, 7)
    assert not weights.merged(Sce(select_topk=0.9), [delta]).any()
    np.testing.assert_array_equal(weights.merged(Sce(), [delta]) > 0, samples.exact(delta) > 0)


def test_zeros_and_empty_tensors_stay_so():
    for shape in ((3, 4), (0, 5), ()):
        zero = {"w": Dense(torch.zeros(shape))}
        for topk in TOPK:
            merged = merge_state([zero, zero], Sce(select_topk=topk, floor=0))["w"]
            assert not merged.to_dense().any()


def test_the_size_of_the_panels_means_nothing(monkeypatch):
    deltas = weights.deltas("mixed", 1.0)
    whole = weights.merged(Sce(select_topk=0.4), deltas)
    monkeypatch.setattr(entrywise, "PANEL_ENTRIES", 30)
    parts = weights.merged(Sce(select_topk=0.4), deltas)
    np.testing.assert_allclose(parts, whole, rtol=2 * weights.U32, atol=0)


def test_what_it_is_not_defined_for_is_refused():
    with pytest.raises(UsageError, match="sce: 1 has the weight 2"):
        merge_one(Sce(), weights.deltas("dense", 1.0, 2), weights=[1.0, 2.0])
    for topk in (-0.1, 1.5):
        with pytest.raises(UsageError, match="'sce': select_topk: "):
            make_method("sce", {"select_topk": topk})
