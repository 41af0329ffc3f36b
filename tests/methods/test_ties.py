"""TIES against its float64 reference, and the properties that define it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.errors import UsageError
from starmerge_models.methods import Ties, make_pipeline
from starmerge_models.methods.kinds import entrywise
from starmerge_models.methods.ties import elected_mean
from tests.oracles import models, samples
from tests.oracles.ties import disjoint_mean, ties


def assert_is_ties(given, weights=None, *, k=20, scope="global", lam=1.0, zero_sign="majority"):
    parameters = {"k": k, "scope": scope, "lambda": lam, "zero_sign": zero_sign}
    expected = ties(models.entries(given), k, scope, lam, zero_sign, weights)
    models.assert_same(models.merge(given, "ties", parameters, weights), expected)


def row(given, weights=None, **parameters):
    """The merged entries of models of one vector."""
    vectors = models.from_entries(*({"x": x} for x in given))
    return models.merge(vectors, "ties", {"k": 100, **parameters}, weights)["x"].ravel().tolist()


@models.OPTIONS
def test_ties_is_the_reference(kind, dtype, entries, weights):
    given = models.models(kind, dtype=dtype, entries=entries)
    for scope in ("global", "local"):
        for zero_sign in ("majority", "zero"):
            assert_is_ties(given, weights, scope=scope, zero_sign=zero_sign)
            assert_is_ties(given, weights, k=88.8, scope=scope, lam=-1.3, zero_sign=zero_sign)


@samples.SEARCH
@given(
    models.many(),
    st.sampled_from([0.01, 20.0, 50.0, 99.9, 100.0]),
    st.sampled_from(["global", "local"]),
    st.sampled_from(["majority", "zero"]),
    st.data(),
)
def test_every_shape_dtype_weight_and_parameter(given, k, scope, zero_sign, data):
    weight = st.sampled_from([1.0, 2.0, 0.5, 0.0, -1.0, -4.0, 3.0])
    weights = data.draw(st.none() | st.tuples(*[weight] * len(given)))
    assert_is_ties(given, weights, k=k, scope=scope, zero_sign=zero_sign)


def test_weights_that_are_no_powers_of_two():
    # No sum of three of -2 ... 2 cancels with them, however they are rounded.
    weights = [0.3, -0.7, 1.9]
    given = [{"x": samples.dense(9, 8, seed=t, entries=samples.integers)} for t in range(3)]
    merged = models.merge(given, "ties", {"k": 60}, weights)["x"]
    expected = ties(models.entries(given), k=60, weights=weights)["x"]
    # The weight and its product are rounded to float32, then the mean, whose terms have one sign.
    np.testing.assert_allclose(merged, expected, rtol=4 * 2.0**-24, atol=0)


def test_the_mean_is_taken_in_float64():
    tau = [np.array([0.1, -3.0, 0.7]), np.array([0.2, 1.0, -0.3]), np.array([0.6, -0.1, -0.4])]
    weights = [0.1, -0.2, 0.7]
    mean = elected_mean(torch.from_numpy(np.stack(tau)), weights, 0.0)
    expected = disjoint_mean(tau, weights, np.sign(sum(tau)))
    np.testing.assert_array_equal(mean.numpy(), expected)


def test_the_defaults():
    defaults = {"k": 20.0, "scope": "global", "lambda": 1.0, "zero_sign": "majority"}
    assert Ties().parameters() == defaults
    given = models.models("mixed", entries=samples.integers)
    models.assert_same(models.merge(given, "ties"), ties(models.entries(given)))


def test_the_mean_is_that_of_the_entries_with_the_elected_sign():
    given = [[3, -1, 5, 0], [1, -3, -2, 0], [-2, 2, -1, 7]]
    assert row(given) == [2, -2, 5, 7]
    assert row(given, **{"lambda": 0.5}) == [1, -1, 2.5, 3.5]


def test_each_task_is_trimmed_before_the_election():
    # Untrimmed, the second entry would be elected positive.
    assert row([[9, 5, 8], [7, -3, 1]], k=60) == [8, -3, 8]
    assert row([[9, 5, 8], [7, -3, 1]], k=100) == [8, 5, 4.5]


@pytest.mark.parametrize("zero_sign", ["majority", "zero"])
def test_entries_that_cancel_take_the_majority_of_the_whole_model_or_none(zero_sign):
    given = models.from_entries(
        {"x": [1, 2, -100], "y": [1]},
        {"x": [1, -2, -90], "y": [3]},
    )
    # Two entries are elected positive, one negative, however large it is.
    merged = models.merge(given, "ties", {"k": 100, "zero_sign": zero_sign})
    cancelled = {"majority": 2, "zero": 0}[zero_sign]
    np.testing.assert_array_equal(merged["x"].ravel(), [1, cancelled, -95])
    np.testing.assert_array_equal(merged["y"].ravel(), [2])


def test_a_negative_majority():
    given = models.from_entries({"x": [[5, 2], [-1, -1]]}, {"x": [[5, -2], [-1, -1]]})
    merged = models.merge(given, "ties", {"k": 100})
    np.testing.assert_array_equal(merged["x"], [[5, -2], [-1, -1]])


def test_entries_that_no_task_has_are_zeros_without_a_sign():
    assert not np.signbit(row([[-1, -1, 0.5], [-1, -1, -0.25]], k=60)[2])


def test_without_a_majority_entries_that_cancel_are_dropped():
    assert row([[1, 2, -1], [3, -2, -1]]) == [2, 0, -1]


def test_all_panels_vote_in_the_majority(monkeypatch):
    given = [[5, 2, -1, -1, -1], [5, -2, -1, -1, -1]]
    monkeypatch.setattr(entrywise, "PANEL_ENTRIES", 2)
    assert row(given) == [5, -2, -1, -1, -1]


def test_trimmed_entries_have_no_vote_in_the_majority():
    given = [[-1, -1, -1, 9, 8], [-1, -1, -1, 9, -8]]
    assert row(given, k=40) == [0, 0, 0, 9, 8]
    assert row(given, k=100) == [-1, -1, -1, 9, -8]


def test_a_trimmed_entry_cancels_nothing():
    assert row([[2, 8], [-2, 1]], k=50, zero_sign="zero") == [-2, 8]
    assert row([[2, 8], [-2, 1]], k=100, zero_sign="zero") == [0, 4.5]


@pytest.mark.parametrize("zero_sign", ["majority", "zero"])
def test_what_is_not_quite_zero_has_a_sign(zero_sign):
    # In float32, 0.1 + 0.2 - 0.3 rounds to zero; the float32 numbers themselves sum to -7e-9.
    assert row([[0.1], [0.2], [-0.3]], zero_sign=zero_sign) == [float(np.float32(-0.3))]


@pytest.mark.parametrize("scope", ["global", "local"])
@samples.SEARCH
@given(models.many(max_tasks=1), st.sampled_from([1.0, 3.0, -0.5]))
def test_one_task_untrimmed_stays_as_it_is(scope, given, weight):
    parameters = {"k": 100, "scope": scope}
    [same] = models.entries(given)
    models.assert_same(models.merge(given, "ties", parameters), same)
    # A weighted mean of one: only the weight's sign is left.
    expected = {name: np.sign(weight) * values for name, values in same.items()}
    models.assert_same(models.merge(given, "ties", parameters, [weight]), expected)


@samples.SEARCH
@given(models.many(), st.sampled_from([2.0, 0.25, 1024.0]))
def test_only_the_ratios_of_weights_count(given, factor):
    weights = [1.0, 2.0, -1.0, 0.5, 4.0][: len(given)]
    more = models.merge(given, "ties", weights=[factor * weight for weight in weights])
    expected = models.merge(given, "ties", weights=weights)
    for name, values in expected.items():
        np.testing.assert_array_equal(more[name], values)


@samples.SEARCH
@given(models.many(), st.data())
def test_a_task_of_weight_0_is_not_there(given, data):
    out = data.draw(st.integers(0, len(given) - 1))
    weights = [float(t != out) for t in range(len(given))]
    without = [{} if t == out else model for t, model in enumerate(given)]
    merged = models.merge(given, "ties", {"scope": "local"}, weights)
    expected = models.merge(without, "ties", {"scope": "local"})
    for name, values in merged.items():
        np.testing.assert_array_equal(values, expected.get(name, np.zeros(values.shape)))


def test_weights_weigh_the_mean_and_the_election():
    assert row([[3, 4], [9, -3]], weights=[2, 1]) == [5, 4]
    assert row([[3, 4], [9, -3]], weights=[1, 2]) == [7, -3]
    assert row([[3, 4], [9, -3]], weights=[1, -1]) == [-9, 3.5]


@pytest.mark.parametrize("k", [0, -20, 100.5, float("nan"), "most"])
def test_k_is_a_percentage_above_0(k):
    with pytest.raises(UsageError, match=r"'ties': k: .*\(got "):
        make_pipeline("ties", {"k": k})


def test_the_scope_is_global_or_local():
    with pytest.raises(UsageError, match=r"'ties': scope: .*'global' or 'local'.*'layer'"):
        make_pipeline("ties", {"scope": "layer"})


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), "one", None])
def test_lambda_is_a_finite_number(factor):
    with pytest.raises(UsageError, match=r"'ties': lambda: .*\(got "):
        make_pipeline("ties", {"lambda": factor})


def test_the_zero_sign_is_the_majority_or_zero():
    with pytest.raises(UsageError, match=r"'ties': zero_sign: .*'majority' or 'zero'.*'negative'"):
        make_pipeline("ties", {"zero_sign": "negative"})
