"""MetaGPT against its float64 reference, and the properties that define it."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from starmerge_models import merge_state
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import make_pipeline
from tests.oracles import bounds, models, samples
from tests.oracles.deltas import frobenius, singular_values
from tests.oracles.metagpt import coefficients, metagpt


def exact(given):
    """The models as float64 matrices, unrounded; zeros where one has no tensor."""
    shapes = {name: delta.shape for model in given for name, delta in model.items()}
    return [
        {
            name: samples.exact(model[name]) if name in model else np.zeros(shape)
            for name, shape in shapes.items()
        }
        for model in given
    ]


def energy_error(model):
    """Error of ||tau||^2 in float64: each sigma moves by E, so sigma^2 by 2 E sigma + E^2."""
    error = 0.0
    for delta in model.values():
        matrix = samples.exact(delta)
        if isinstance(delta, LowRank):
            sigma, moved = singular_values(matrix), bounds.spectrum(delta)
            error += 2 * moved * np.sum(sigma) + len(sigma) * moved**2
        error += bounds.gamma(matrix.size + 4, bounds.U64) * frobenius(matrix) ** 2
    return error


def bound(given, name, weights):
    """Entrywise error of sum(lambda_t tau_t).

    Of lambda_t = e_t / sum(e) the numerator and the denominator are known as above. The sum is
    one of float32 factors, each of which meets its weight and lambda too: four roundings more.
    """
    scaled = [models.scaled([model], w)[0] for model, w in zip(given, weights, strict=True)]
    tasks = exact(scaled)
    lambdas = coefficients(tasks)
    whole = sum(frobenius(x) ** 2 for task in tasks for x in task.values())
    errors = [energy_error(model) for model in scaled]
    members = [t for t, model in enumerate(given) if name in model]
    roundings = sum(bounds.terms(given[t][name]) for t in members) + 11
    total = 0.0
    for t in members:
        moved = (errors[t] + lambdas[t] * sum(errors)) / whole
        share = bounds.gamma(roundings, bounds.U32) * lambdas[t] + 2 * moved
        total = total + share * abs(weights[t]) * bounds.magnitude(given[t][name])
    return total


def assert_is_metagpt(given, weights=None):
    merged = models.merge(given, "metagpt", weights=weights)
    expected = metagpt(exact(given), weights)
    assert merged.keys() == expected.keys()
    for name, want in expected.items():
        error = np.abs(merged[name] - want)
        assert np.all(error <= bound(given, name, weights or [1.0] * len(given))), name


@pytest.mark.parametrize("weights", [None, models.WEIGHTS, [0.3, 1.7, -0.6, 1.0]])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_metagpt_is_the_reference(kind, dtype, weights):
    assert_is_metagpt(models.models(kind, dtype=dtype), weights)


@samples.SEARCH
@given(models.many(), st.data())
def test_every_shape_dtype_and_weight(given, data):
    weight = st.sampled_from([1.0, 2.0, 0.1, 0.0, -1.0])
    weights = data.draw(st.none() | st.tuples(*[weight] * len(given)))
    factors = weights or (1.0,) * len(given)
    assume(
        any(w and x.any() for w, m in zip(factors, exact(given), strict=True) for x in m.values())
    )
    assert_is_metagpt(given, weights)


def test_norms_are_those_of_the_whole_model():
    given = models.from_entries({"x": [3], "y": [4]}, {"x": [0], "y": [-5]}, {"z": [[1, 7]]})
    merged = models.merge(given, "metagpt")
    # 25, 25 and 50.
    np.testing.assert_array_equal(merged["x"], [[0.75]])
    np.testing.assert_array_equal(merged["y"], [[-0.25]])
    np.testing.assert_array_equal(merged["z"], [[0.5, 3.5]])


def test_a_weight_counts_in_the_norm_and_in_the_sum():
    given = models.from_entries({"x": [5, 0]}, {"x": [0, 5]})
    merged = models.merge(given, "metagpt", weights=[2, -1])
    np.testing.assert_array_equal(merged["x"].ravel(), [8, -1])
    merged = models.merge(given, "metagpt", weights=[1, 0])
    np.testing.assert_array_equal(merged["x"].ravel(), [5, 0])


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_one_model_stays_as_it_is(kind):
    [same] = models.models(kind)[:1]
    merged = models.merge([same], "metagpt")
    for name, delta in same.items():
        np.testing.assert_array_equal(merged[name], samples.values(delta))


def test_equal_norms_give_the_average():
    given = models.from_entries({"x": [3, 4]}, {"x": [-5, 0]}, {"x": [4, -3]}, {"x": [0, 5]})
    np.testing.assert_array_equal(models.merge(given, "metagpt")["x"].ravel(), [0.5, 1.5])


@samples.SEARCH
@given(models.many(), st.integers(-30, 30), st.sampled_from([1, -1]))
def test_powers_of_two_and_signs_go_through(given, exponent, sign):
    factor = sign * 2.0**exponent
    scaled = models.merge(models.scaled(given, factor), "metagpt")
    for name, values in models.merge(given, "metagpt").items():
        np.testing.assert_array_equal(scaled[name], factor * values)


@samples.SEARCH
@given(models.many(), st.data())
def test_the_order_of_the_tasks_means_nothing(given, data):
    order = data.draw(st.permutations(range(len(given))))
    assume(any(x.any() for model in exact(given) for x in model.values()))
    permuted = models.merge([given[t] for t in order], "metagpt")
    for name, values in models.merge(given, "metagpt").items():
        error = np.abs(permuted[name] - values)
        assert np.all(error <= 2 * bound(given, name, [1.0] * len(given)))


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_task_of_zeros_changes_nothing(place):
    given = models.models("mixed")
    expected = models.merge(given, "metagpt")
    for zero in ({}, models.zeroed(given[0])):
        merged = models.merge([*given[:place], zero, *given[place:]], "metagpt")
        for name, values in expected.items():
            np.testing.assert_array_equal(merged[name], values)


def test_zeros_alone_stay_zeros():
    zero = {
        "full": Dense(torch.zeros(3, 4)),
        "adapter": LowRank(torch.zeros(4, 2), torch.ones(2, 3)),
        "unscaled": LowRank(torch.ones(4, 2), torch.ones(2, 3), 0.0),
        "scalar": Dense(torch.tensor(0.0)),
        "empty": Dense(torch.zeros(0, 5)),
    }
    for values in models.merge([zero, {}, zero], "metagpt").values():
        np.testing.assert_array_equal(values, np.zeros(values.shape))


def test_models_that_change_nothing_leave_nothing():
    assert models.merge([{}, {}], "metagpt") == {}


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_squares_beyond_float32(kind, size):
    given = [
        {"x": LowRank(samples.normal(6, 2, seed=t), samples.normal(2, 5, seed=9 + t), size * t)}
        for t in (1, 2)
    ]
    if kind == "dense":
        given = [{"x": Dense(model["x"].to_dense())} for model in given]
    assert_is_metagpt(given)


def test_adapters_stay_factored():
    merged = merge_state(models.models("low-rank"), make_pipeline("metagpt"))
    assert isinstance(merged["query"], LowRank)
    assert merged["query"].rank == 3 + 1 + 8 + 4


def test_metagpt_has_no_parameters():
    with pytest.raises(UsageError, match=r"'metagpt' has no parameter 'alpha'.*none"):
        make_pipeline("metagpt", {"alpha": 1})
