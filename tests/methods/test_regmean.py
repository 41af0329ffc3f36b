"""RegMean against its float64 reference, and as the minimum that it is."""

import numpy as np
import pytest
import torch

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.merging.in_memory import merge_state
from starmerge_models.methods import RegMean, make_method
from tests.merge_one import merge_one
from tests.oracles import metric, regmean, samples, spectral
from tests.products import one_in

WEIGHTS = (1.0, 0.5, 2.0, 4.0)
SIDES = ["columns", "rows"]
FEW, MANY = (2, 1, 3, 1), (6, 4, 9, 2)
"""Rows of the roots of four tasks; of inputs of 9 to 40 entries."""


def inputs_of(n, side="columns", rows=FEW):
    """Inputs of tasks, and their second moments in float64."""
    roots = [metric.one_root(n, min(k, n), 10 * t + 3) for t, k in enumerate(rows)]
    inputs, _ = metric.inputs_of(n, side=side, roots=roots)
    return inputs, [metric.sigma_of(root) for root in roots]


def matrices(deltas):
    return [samples.exact(delta) for delta in deltas]


def merged(deltas, inputs, method=None, **context):
    return merge_one(method or RegMean(), deltas, inputs=inputs, **context).delta


def assert_close(found, expected, deltas, times=1.0):
    # The condition of the softened moments is at most n of the largest ratio of their diagonals.
    spectral.assert_close(samples.exact(found), expected, deltas, condition=1e6, times=times)


@pytest.mark.parametrize(
    ("shape", "kind", "rows", "side", "parameters"),
    one_in(
        3,
        spectral.SHAPES,
        samples.KINDS,
        [FEW, MANY, (12, 40, 40, 40)],
        SIDES,
        [{}, {"off_diagonal": 0.1}, {"off_diagonal": 0, "ridge": 1}],
    ),
)
def test_regmean_is_the_reference(shape, kind, rows, side, parameters):
    m, n = shape
    deltas = samples.task_deltas(kind, m, n)
    inputs, sigmas = inputs_of(n if side == "columns" else m, side, rows)
    found = merged(deltas, inputs, RegMean(**parameters), weights=WEIGHTS)
    expected = regmean.regmean(matrices(deltas), sigmas, WEIGHTS, side, **parameters)
    assert_close(found, expected, deltas, times=4)
    assert isinstance(found, LowRank if kind == "low-rank" else Dense)


def test_without_a_softening_directions_that_no_prompt_has_are_averaged():
    n = 20
    deltas = samples.task_deltas("low-rank", 12, n)
    inputs, sigmas = inputs_of(n)
    method = RegMean(off_diagonal=1, ridge=1e-3)
    found = samples.exact(merged(deltas, inputs, method))
    expected = regmean.regmean(matrices(deltas), sigmas, off_diagonal=1, ridge=1e-3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    values, vectors = np.linalg.eigh(sum(sigmas))
    unseen = vectors[:, values < 1e-6 * values[-1]]
    assert unseen.shape[1] == n - sum(FEW)
    np.testing.assert_allclose(
        found @ unseen, sum(matrices(deltas)) / 4 @ unseen, rtol=0, atol=1e-4 * np.abs(found).max()
    )


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_no_other_update_has_less_of_the_objective(rows):
    deltas = samples.task_deltas("dense", 7, 9)
    inputs, sigmas = inputs_of(9, rows=rows)
    M = samples.exact(merged(deltas, inputs, weights=WEIGHTS))
    least = regmean.objective(M, matrices(deltas), sigmas, WEIGHTS)
    for seed in range(5):
        step = 1e-2 * samples.normal(*M.shape, seed=seed).double().numpy()
        for other in (M + step, M - step):
            assert regmean.objective(other, matrices(deltas), sigmas, WEIGHTS) > least


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_one_task_is_itself(kind, side):
    m, n = 12, 9
    inputs, _ = inputs_of(n if side == "columns" else m, side)
    for delta in samples.task_deltas(kind, m, n):
        for weight in (1.0, 3.0):
            found = merged([delta], inputs, weights=(weight,))
            assert_close(found, samples.exact(delta), [delta], times=4)


def test_equal_inputs_give_the_weighted_mean():
    deltas = samples.task_deltas("low-rank", 12, 9)
    root = metric.one_root(9, 5, 0)
    inputs, _ = metric.inputs_of(9, roots=[root, 3 * root, root, 0.1 * root])
    found = merged(deltas, inputs, weights=WEIGHTS)
    expected = np.average(matrices(deltas), axis=0, weights=WEIGHTS)
    assert_close(found, expected, deltas, times=4)


def test_a_task_that_leaves_the_tensor_alone_keeps_its_inputs_free_of_change():
    deltas = samples.task_deltas("low-rank", 12, 9)[:3]
    inputs, sigmas = inputs_of(9)
    found = merged(deltas, inputs, tasks=4)
    expected = regmean.regmean([*matrices(deltas), np.zeros((12, 9))], sigmas)
    assert_close(found, expected, deltas, times=4)
    without = regmean.regmean(matrices(deltas), sigmas[:3])
    root = inputs.read(3).root.double().numpy()
    assert np.linalg.norm(expected @ root.T) < 0.5 * np.linalg.norm(without @ root.T)


def test_a_weight_of_zero_takes_a_task_out():
    deltas = samples.task_deltas("low-rank", 12, 9)
    inputs, sigmas = inputs_of(9)
    found = merged(deltas, inputs, weights=(1.0, 2.0, 0.5, 0.0))
    expected = regmean.regmean(matrices(deltas)[:3], sigmas[:3], (1.0, 2.0, 0.5))
    assert_close(found, expected, deltas, times=4)


def test_inputs_of_zeros_count_all_directions_alike():
    deltas = samples.task_deltas("low-rank", 12, 9)[:2]
    roots = [torch.zeros(1, 9), metric.one_root(9, 4, 0)]
    inputs, _ = metric.inputs_of(9, roots=roots)
    expected = regmean.regmean(matrices(deltas), [metric.sigma_of(root) for root in roots])
    assert_close(merged(deltas, inputs), expected, deltas, times=4)


def test_the_size_of_the_inputs_of_a_task_does_not_count():
    deltas = samples.task_deltas("low-rank", 12, 9)
    roots = [metric.one_root(9, 3, t) for t in range(4)]
    inputs, _ = metric.inputs_of(9, roots=roots)
    scaled, _ = metric.inputs_of(9, roots=[10.0 ** (5 * t - 8) * R for t, R in enumerate(roots)])
    expected = samples.exact(merged(deltas, inputs))
    assert_close(merged(deltas, scaled), expected, deltas, times=4)


def test_embeddings_of_full_finetunes_are_averaged():
    matrix = samples.task_deltas("dense", 12, 9)
    inputs, _ = inputs_of(9)
    found = merged(matrix, inputs, is_embedding=True)
    spectral.assert_close(samples.exact(found), sum(matrices(matrix)) / 4, matrix)
    kept = merged(matrix, inputs, RegMean(embeddings="merge"), is_embedding=True)
    np.testing.assert_array_equal(samples.exact(kept), samples.exact(merged(matrix, inputs)))


@pytest.mark.parametrize(
    "zero", [Dense(torch.zeros(6, 5)), LowRank(torch.zeros(6, 2), torch.ones(2, 5))]
)
def test_zeros_stay_zero(zero):
    inputs, _ = inputs_of(5)
    assert not samples.exact(merged([zero] * 3, inputs)).any()


def test_without_a_metric_it_is_refused():
    deltas = [{"weight": delta} for delta in samples.task_deltas("low-rank")]
    for method in ("regmean", "star+regmean"):
        with pytest.raises(UsageError, match=r"regmean: it needs the moments.*--prompts"):
            merge_state(deltas, method)


def test_weights_that_mean_nothing_are_refused():
    deltas = [{"weight": delta} for delta in samples.task_deltas("low-rank")]
    with pytest.raises(UsageError, match="regmean: a weight is negative"):
        merge_state(deltas, "regmean", weights=[1, 1, 1, -0.5])
    with pytest.raises(UsageError, match="sum to zero"):
        merge_state(deltas, "regmean", weights=[0, 0, 0, 0])


@pytest.mark.parametrize("parameters", [{"off_diagonal": 1.1}, {"ridge": 0}, {"ridge": -1}])
def test_parameters_out_of_range_are_refused(parameters):
    with pytest.raises(UsageError, match=next(iter(parameters))):
        make_method("regmean", parameters)
