"""Consensus task arithmetic against its float64 reference, and the properties that define it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.errors import UsageError
from starmerge_models.methods import TallMasks, make_pipeline
from tests.oracles import models, samples
from tests.oracles.tall_masks import tall_masks


def assert_is_tall_masks(given, weights=None, *, lam=0.4, alpha=0.4, min_tasks=2, mtl="unscaled"):
    parameters = {"lambda": lam, "alpha": alpha, "min_tasks": min_tasks, "mtl": mtl}
    expected = tall_masks(models.entries(given), lam, alpha, min_tasks, mtl, weights)
    models.assert_same(models.merge(given, "tall_masks", parameters, weights), expected)


def row(given, weights=None, **parameters):
    """The merged entries of models of one vector."""
    vectors = models.from_entries(*({"x": x} for x in given))
    parameters = {"alpha": 1, **parameters}
    return models.merge(vectors, "tall_masks", parameters, weights)["x"].ravel().tolist()


@models.OPTIONS
def test_tall_masks_is_the_reference(kind, dtype, entries, weights):
    given = models.models(kind, dtype=dtype, entries=entries)
    for mtl in ("unscaled", "scaled"):
        for min_tasks in (1, 2, 4):
            assert_is_tall_masks(given, weights, min_tasks=min_tasks, mtl=mtl)
        assert_is_tall_masks(given, weights, lam=1, alpha=-1.7, mtl=mtl)


@samples.SEARCH
@given(
    models.many(),
    st.sampled_from([0.0, 0.2, 0.5, 1.0, 2.0]),
    st.sampled_from([0.4, 1.0, -0.3, 0.0]),
    st.sampled_from(["unscaled", "scaled"]),
    st.data(),
)
def test_every_shape_dtype_weight_and_parameter(given, lam, alpha, mtl, data):
    weight = st.sampled_from([1.0, 2.0, 0.5, 0.0, -1.0, 3.0])
    weights = data.draw(st.none() | st.tuples(*[weight] * len(given)))
    min_tasks = data.draw(st.integers(1, len(given)))
    assert_is_tall_masks(given, weights, lam=lam, alpha=alpha, min_tasks=min_tasks, mtl=mtl)


def test_the_defaults():
    defaults = {"lambda": 0.4, "alpha": 0.4, "min_tasks": 2, "mtl": "unscaled"}
    assert TallMasks().parameters() == defaults
    given = models.models("mixed", entries=samples.integers)
    models.assert_same(models.merge(given, "tall_masks"), tall_masks(models.entries(given)))


def test_entries_that_too_few_tasks_need_are_dropped():
    # Needed by two tasks, by one, by none: three tasks whose sum is 5 leave 4, 4 and 2 to outweigh.
    given = [[4, 9, 1], [3, 1, 1], [0, 1, 1], [0, 1, 1]]
    assert row(given, **{"lambda": 0.5}) == [7, 0, 0]
    assert row(given, **{"lambda": 0.5, "min_tasks": 1}) == [7, 12, 0]
    assert row(given, **{"lambda": 0.5, "min_tasks": 3}) == [0, 0, 0]


def test_a_task_must_outweigh_the_rest_not_equal_it():
    assert row([[3, 2], [3, 2]], **{"lambda": 1}) == [0, 0]
    assert row([[3, 2], [3, 2]], **{"lambda": 0.999}) == [6, 4]
    assert row([[4], [2], [0]], **{"lambda": 2, "min_tasks": 1}) == [0]
    assert row([[4], [2], [0]], **{"lambda": 1.999, "min_tasks": 1}) == [6]


def test_with_lambda_0_a_task_needs_every_entry_that_is_not_0():
    assert row([[1, 1, 0], [1e-30, 0, 0]], **{"lambda": 0}) == [1, 0, 0]


def test_the_scaled_sum_keeps_more():
    # 1 against |3 − 1|, or against |0.4 · 3 − 1|.
    given = [[1], [1], [1]]
    assert row(given, **{"lambda": 0.6, "mtl": "unscaled"}) == [0]
    assert row(given, **{"lambda": 0.6, "mtl": "scaled", "alpha": 0.4}) == [np.float32(1.2)]


@samples.SEARCH
@given(models.many(max_tasks=1), st.sampled_from(["unscaled", "scaled"]))
def test_one_task_needs_all_its_entries(given, mtl):
    parameters = {"min_tasks": 1, "mtl": mtl, "alpha": 0.5}
    [same] = models.entries(given)
    expected = {name: 0.5 * values for name, values in same.items()}
    models.assert_same(models.merge(given, "tall_masks", parameters), expected)


@samples.SEARCH
@given(models.many(), st.data())
def test_weights_multiply_the_task_vectors(given, data):
    weight = st.sampled_from([1.0, 2.0, 0.5, 0.0, -1.0])
    weights = data.draw(st.tuples(*[weight] * len(given)))
    scaled = [models.scaled([model], w)[0] for model, w in zip(given, weights, strict=True)]
    merged = models.merge(given, "tall_masks", {"min_tasks": 1}, weights)
    for name, values in models.merge(scaled, "tall_masks", {"min_tasks": 1}).items():
        np.testing.assert_array_equal(merged[name], values)


@pytest.mark.parametrize(("tasks", "min_tasks"), [(1, 2), (3, 4)])
def test_more_tasks_than_there_are_cannot_need_an_entry(tasks, min_tasks):
    given = [{"x": samples.dense(2, 3)}] * tasks
    with pytest.raises(UsageError, match=rf"min_tasks is {min_tasks}.* {tasks} models.*Lower"):
        models.merge(given, "tall_masks", {"min_tasks": min_tasks})
    models.merge(given, "tall_masks", {"min_tasks": tasks})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lambda", -0.1),
        ("lambda", float("inf")),
        ("alpha", float("nan")),
        ("alpha", None),
        ("min_tasks", 0),
        ("min_tasks", 1.5),
    ],
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(UsageError, match=rf"'tall_masks': {key}: .*\(got "):
        make_pipeline("tall_masks", {key: value})


def test_the_sum_is_scaled_or_not():
    with pytest.raises(UsageError, match=r"mtl: .*'unscaled' or 'scaled'.*'mean'"):
        make_pipeline("tall_masks", {"mtl": "mean"})
