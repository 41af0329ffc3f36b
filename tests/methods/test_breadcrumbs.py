"""Model Breadcrumbs against its float64 reference, and the properties that define it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.errors import UsageError
from starmerge_models.methods import Breadcrumbs, make_pipeline
from tests.oracles import models, samples
from tests.oracles.breadcrumbs import breadcrumbs


def assert_is_breadcrumbs(given, weights=None, *, beta=85, gamma=99.3, alpha=0.3):
    parameters = {"beta": beta, "gamma": gamma, "alpha": alpha}
    expected = breadcrumbs(models.entries(given), beta, gamma, alpha, weights)
    models.assert_same(models.merge(given, "breadcrumbs", parameters, weights), expected)


def row(*given, **parameters):
    """The merged entries of models of one vector."""
    vectors = models.from_entries(*({"x": x} for x in given))
    return models.merge(vectors, "breadcrumbs", {"alpha": 1, **parameters})["x"].ravel().tolist()


@models.OPTIONS
def test_breadcrumbs_is_the_reference(kind, dtype, entries, weights):
    given = models.models(kind, dtype=dtype, entries=entries)
    for beta, gamma in ((85, 99.3), (10.5, 90), (0, 60), (49.9, 50), (30, 100)):
        assert_is_breadcrumbs(given, weights, beta=beta, gamma=gamma)
    assert_is_breadcrumbs(given, weights, beta=40, gamma=70, alpha=-1.1)


@samples.SEARCH
@given(
    models.many(),
    st.integers(0, 999),
    st.integers(1, 1000),
    st.sampled_from([0.3, 1.0, -0.7, 0.0]),
    st.data(),
)
def test_every_shape_dtype_weight_and_percentile(given, beta, wide, alpha, data):
    weight = st.sampled_from([1.0, 2.0, 0.5, 0.0, -1.0, 3.0])
    weights = data.draw(st.none() | st.tuples(*[weight] * len(given)))
    gamma = min(1000, beta + wide)
    assert_is_breadcrumbs(given, weights, beta=beta / 10, gamma=gamma / 10, alpha=alpha)


def test_the_defaults():
    assert Breadcrumbs().parameters() == {"beta": 85.0, "gamma": 99.3, "alpha": 0.3}
    given = [{"x": samples.dense(40, 30, seed=seed)} for seed in range(3)]
    models.assert_same(models.merge(given, "breadcrumbs"), breadcrumbs(models.entries(given)))


def test_both_tails_are_dropped():
    given = [1, -2, 3, -4, 5, -6, 7, -8, 9, -10]
    assert row(given, beta=30, gamma=80) == [0, 0, 0, -4, 5, -6, 7, -8, 0, 0]
    assert row(given, beta=39, gamma=89) == [0, 0, 0, -4, 5, -6, 7, -8, 9, 0]


def test_each_tensor_and_task_has_percentiles_of_its_own():
    given = models.from_entries(
        {"x": [1, 2, 3], "y": [100, 300, 200]},
        {"x": [0.75, 0.25, 0.5]},
    )
    merged = models.merge(given, "breadcrumbs", {"beta": 34, "gamma": 66, "alpha": 2})
    np.testing.assert_array_equal(merged["x"].ravel(), [0, 4, 1])
    np.testing.assert_array_equal(merged["y"].ravel(), [0, 0, 400])


def test_entries_that_equal_the_last_one_kept_stay():
    assert row([1, 1, 2, 3, -3], beta=20, gamma=80) == [1, 1, 2, 3, -3]
    assert row([1, 1, 2, 3, -3], beta=40, gamma=80) == [0, 0, 2, 3, -3]
    assert row([1, 1, 2, 3, -3], beta=20, gamma=60) == [1, 1, 2, 0, 0]
    assert row([-4, 4, 4, -4], beta=75, gamma=75.1) == [-4, 4, 4, -4]


@samples.SEARCH
@given(st.integers(1, 200), st.integers(0, 999), st.integers(1, 1000), samples.seeds)
def test_of_different_magnitudes_exactly_the_share_stays(n, beta, wide, seed):
    gamma = min(1000, beta + wide)
    generator = np.random.default_rng(seed)
    x = generator.permutation(np.arange(1.0, n + 1)) * generator.choice([-1, 1], n)
    kept = np.abs([entry for entry in row(x, beta=beta / 10, gamma=gamma / 10) if entry])
    smallest, largest = n * beta // 1000, n * (1000 - gamma) // 1000
    np.testing.assert_array_equal(np.sort(kept), np.arange(smallest + 1, n - largest + 1))


def test_percentages_are_taken_as_written():
    # In binary, (100 - 99.4) % of 1000 is 5.9999....
    x = np.arange(1.0, 1001.0)
    assert row(x, beta=0, gamma=99.4) == [*x[:994], *[0.0] * 6]
    # And 0.07 % of 10000 is 7.000000000000001; 0.29 % of 10000 is 28.999999999999996.
    x = np.arange(1.0, 10001.0)
    assert row(x, beta=0.29, gamma=100) == [*[0.0] * 29, *x[29:]]


def test_small_tensors_lose_no_outlier():
    x = np.arange(1.0, 143.0)
    assert row(x, beta=0) == x.tolist()
    assert row([*x, 143.0], beta=0) == [*x, 0.0]
    assert row([-7.0]) == [-7.0]


@samples.SEARCH
@given(models.many())
def test_beta_0_and_gamma_100_are_task_arithmetic(given):
    merged = models.merge(given, "breadcrumbs", {"beta": 0, "gamma": 100, "alpha": 0.5})
    for name, values in models.merge(given, "task_arithmetic", {"alpha": 0.5}).items():
        np.testing.assert_array_equal(merged[name], values)


@samples.SEARCH
@given(models.many(), st.sampled_from([0, 15, 50, 80.5, 99]))
def test_gamma_100_trims_each_tensor(given, beta):
    parameters = {"k": 100 - beta, "scope": "local", "alpha": 0.5}
    merged = models.merge(given, "breadcrumbs", {"beta": beta, "gamma": 100, "alpha": 0.5})
    for name, values in models.merge(given, "trim+task_arithmetic", parameters).items():
        np.testing.assert_array_equal(merged[name], values)


@pytest.mark.parametrize(("beta", "gamma"), [(90, 80), (85, 85), (99.5, 99.3)])
def test_beta_is_below_gamma(beta, gamma):
    given = [{"x": samples.dense(2, 3)}]
    with pytest.raises(UsageError, match=f"beta is {beta} and gamma {gamma}.*Choose beta below"):
        models.merge(given, "breadcrumbs", {"beta": beta, "gamma": gamma})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta", -0.1),
        ("beta", 100),
        ("gamma", 0),
        ("gamma", 100.1),
        ("gamma", float("nan")),
        ("alpha", float("inf")),
        ("alpha", "much"),
    ],
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(UsageError, match=rf"'breadcrumbs': {key}: .*\(got "):
        make_pipeline("breadcrumbs", {key: value})
