"""ACE-Merging against its float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import Ace, make_method
from tests.oracles import ace, samples, spectral

WEIGHTS = [1.0, 0.5, -2.0, 4.0]


def matrices(deltas, weights=None):
    weights = weights or [1.0] * len(deltas)
    return [w * samples.exact(delta) for w, delta in zip(weights, deltas, strict=True)]


def condition(deltas, eps=0.01):
    """Of ΣS_t + C: the largest eigenvalue over the least, ε a task; squared for the product."""
    energy = sum(np.sum(matrix**2) for matrix in matrices(deltas))
    return 1e3 * (1.0 + energy / eps)


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), spectral.SHAPES)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1e6])
def test_ace_is_the_reference(m, n, kind, dtype, gamma):
    deltas = [delta.scaled(0.125) for delta in samples.task_deltas(kind, m, n, dtype=dtype)]
    found = spectral.merged(Ace(gamma=gamma), deltas)
    expected = ace.ace(matrices(deltas), threshold=gamma)
    spectral.assert_close(found, expected, deltas, condition=condition(deltas))


@pytest.mark.parametrize("parameters", [{"epsilon": 1.0}, {"top": 0.0}, {"top": 0.7}, {"top": 1.0}])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_every_parameter(kind, parameters):
    deltas = [delta.scaled(0.125) for delta in samples.task_deltas(kind, 30, 20)]
    found = spectral.merged(Ace(gamma=0.0, **parameters), deltas)
    eps, top = parameters.get("epsilon", 0.01), parameters.get("top", 0.3)
    expected = ace.ace(matrices(deltas), eps, 0.0, top)
    spectral.assert_close(found, expected, deltas, condition=condition(deltas))


def test_tasks_of_different_sizes_are_refined_and_others_are_not():
    deltas = samples.task_deltas("low-rank", 30, 20)
    uneven = [delta.scaled(2.0 ** (-5 * t)) for t, delta in enumerate(deltas)]
    for chosen, heterogeneous in ((deltas, False), (uneven, True)):
        assert (ace.heterogeneity(matrices(chosen)) > 0.3) == heterogeneous
        default = spectral.merged(Ace(), chosen)
        same = spectral.merged(Ace(gamma=0.0 if heterogeneous else 1e6), chosen)
        np.testing.assert_array_equal(default, same)
        other = spectral.merged(Ace(gamma=1e6 if heterogeneous else 0.0), chosen)
        assert np.linalg.norm(default - other) > 1e-3 * np.linalg.norm(default)
    expected = ace.ace(matrices(uneven))
    found = spectral.merged(Ace(), uneven)
    # The relative ridge of the smallest task is the largest: that one sets the condition.
    spectral.assert_close(found, expected, uneven, condition=condition(uneven))


@pytest.mark.parametrize("kind", samples.KINDS)
def test_weights_multiply_the_task_vectors(kind):
    deltas = [delta.scaled(0.125) for delta in samples.task_deltas(kind, 30, 20)]
    found = spectral.merged(Ace(), deltas, WEIGHTS)
    expected = ace.ace(matrices(deltas, WEIGHTS))
    spectral.assert_close(found, expected, deltas, condition=64 * condition(deltas), times=8)


@samples.SEARCH
@given(samples.task_lists())
def test_every_shape_rank_and_dtype(deltas):
    tau = matrices(deltas)
    assume(all(1e-2 < np.linalg.norm(delta) < 1e2 for delta in tau))
    # Rows that differ, or do not: not something in between.
    assume(all(np.linalg.norm(ace.centred(delta)) > 1e-2 for delta in tau))
    found = spectral.merged(Ace(gamma=1e9), deltas)
    expected = ace.ace(tau, threshold=1e9)
    spectral.assert_close(found, expected, deltas, condition=condition(deltas))


def test_tasks_whose_rows_are_all_equal_are_left_out():
    deltas = [delta.scaled(0.125) for delta in samples.task_deltas("low-rank", 30, 20)]
    equal = LowRank(samples.normal(1, 2, seed=1).repeat(30, 1), samples.normal(2, 20, seed=2))
    expected = spectral.merged(Ace(), deltas)
    for chosen in (equal, *spectral.as_dense([equal])):
        found = spectral.merged(Ace(), [*deltas, chosen])
        spectral.assert_close(found, expected, deltas, times=2, condition=condition(deltas))
        assert not spectral.merged(Ace(), [chosen] * 2).any()


@pytest.mark.parametrize("stored", ["factors", "matrices"])
def test_a_small_task_beside_a_large_one_is_not_taken_for_rounding(stored):
    deltas = [samples.low_rank(30, 20, 3, seed=1), samples.low_rank(30, 20, 3, seed=2, scale=1e-8)]
    if stored == "matrices":
        deltas = spectral.as_dense(deltas)
        deltas[1] = Dense(deltas[1].tensor.float())
    found = spectral.merged(Ace(gamma=0.0, top=0.0), deltas)
    expected = ace.ace(matrices(deltas), threshold=0.0, top=0.0)
    alone = spectral.merged(Ace(gamma=0.0, top=0.0), deltas[:1])
    assert np.linalg.norm(expected - alone) > 1e-3 * np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_equal_tasks_are_as_one(kind):
    delta = samples.task_deltas(kind, 30, 20)[2].scaled(0.125)
    found = spectral.merged(Ace(), [delta] * 3)
    expected = spectral.merged(Ace(), [delta])
    spectral.assert_close(found, expected, [delta] * 3, times=2, condition=condition([delta]))


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_tasks_of_norm_1_are_alike(gamma):
    # Their heterogeneity is 0/0 as the paper writes it.
    first, second = np.zeros((6, 5)), np.zeros((6, 5))
    first[0, 1], second[2, 3] = 1.0, -1.0
    deltas = [Dense(torch.from_numpy(matrix)) for matrix in (first, second)]
    found = spectral.merged(Ace(gamma=gamma), deltas)
    expected = ace.ace([first, second], threshold=gamma)
    spectral.assert_close(found, expected, deltas)
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found, spectral.merged(Ace(gamma=1e6), deltas))


def test_one_task_is_the_reference():
    delta = samples.low_rank(30, 20, 3, scale=0.125)
    found = spectral.merged(Ace(), [delta])
    expected = ace.ace(matrices([delta]))
    spectral.assert_close(found, expected, [delta], condition=condition([delta]))


@pytest.mark.parametrize("parameters", [{"epsilon": 0.0}, {"top": 1.5}, {"gamma": -1.0}])
def test_parameters_out_of_range_are_refused(parameters):
    with pytest.raises(UsageError, match=next(iter(parameters))):
        make_method("ace", parameters)
