"""The factor on a merged update, and coefficients measured in factor space."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.merging.in_memory import merge_state
from starmerge_models.methods import Pipeline, Scale, TaskArithmetic, make_pipeline
from tests.oracles import bounds, metagpt, samples, spectral


@pytest.mark.parametrize("factor", [0.5, -2.0, 0.0, 1e-9, 0.3])
@pytest.mark.parametrize("merge", ["average", "tsv_m", "covariance", "task_arithmetic", "knots"])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_scale_multiplies_the_update(kind, merge, factor):
    deltas = samples.task_deltas(kind, 30, 20)
    merged = spectral.merged(merge, deltas)
    found = spectral.merged(make_pipeline(f"{merge}+scale", {"factor": factor}), deltas)
    # A matrix meets two roundings, of the factor and of the product; factors of a delta none.
    error = np.abs(found - factor * merged)
    assert np.all(error <= bounds.gamma(2, bounds.U32) * np.abs(factor * merged) + 1e-18)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_default_factor_is_1(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged("tsv_m+scale", deltas)
    np.testing.assert_array_equal(found, spectral.merged("tsv_m", deltas))


@samples.SEARCH
@given(samples.task_lists(), st.floats(-4, 4, width=16))
def test_a_scaled_sum_is_task_arithmetic(deltas, factor):
    chain = Pipeline.of([TaskArithmetic(alpha=1.0), Scale(factor=factor)])
    found = spectral.merged(chain, deltas)
    expected = factor * sum(map(samples.exact, deltas))
    assert np.all(np.abs(found - expected) <= bounds.weighted_sum(deltas, factor) + 1e-30)


def test_adapters_stay_factored_and_vectors_are_scaled_too():
    found = spectral.merge(
        make_pipeline("average+scale", {"factor": 2.0}), samples.task_deltas("low-rank")
    )
    assert isinstance(found, LowRank)
    vector = Dense(torch.tensor([1.0, -2.0]))
    found = spectral.merge(make_pipeline("average+scale", {"factor": 2.0}), [vector])
    assert found.tensor.flatten().tolist() == [2.0, -4.0]


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), "much"])
def test_what_is_no_number_is_refused(factor):
    with pytest.raises(UsageError, match="factor"):
        make_pipeline("average+scale", {"factor": factor})


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0, 4.0]])
def test_metagpt_is_the_same_in_factors_and_in_matrices(weights):
    shapes = {"first": (30, 20), "second": (12, 40)}
    tensors = {name: samples.task_deltas("low-rank", *shape) for name, shape in shapes.items()}
    factored = [{name: deltas[t] for name, deltas in tensors.items()} for t in range(4)]
    full = [
        {name: spectral.as_dense([delta])[0] for name, delta in model.items()} for model in factored
    ]
    exact = [{name: samples.exact(delta) for name, delta in model.items()} for model in factored]
    expected = metagpt.metagpt(exact, weights)
    for models, kind in ((factored, LowRank), (full, Dense)):
        found = merge_state(models, "metagpt", weights=weights)
        for name, delta in found.items():
            assert isinstance(delta, kind)
            bound = 4 * bounds.weighted_sum(tensors[name]) + 1e-12
            assert np.all(np.abs(samples.exact(delta) - expected[name]) <= bound)
            size = np.linalg.norm(expected[name])
            assert np.linalg.norm(samples.exact(delta) - expected[name]) <= 1e-6 * size
