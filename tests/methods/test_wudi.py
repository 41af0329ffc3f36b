"""WUDI against its float64 reference, and the objective that it lessens."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.merging.in_memory import merge_state
from starmerge_models.methods import Covariance, Wudi, make_method
from tests.merge_one import merge_one
from tests.oracles import bounds, samples, spectral, wudi
from tests.products import one_in

WEIGHTS = [1.0, 0.5, 2.0, 4.0]
LR, STEPS = 1e-3, 40
"""Steps that move entries as far as those of the samples reach, in two seconds of tests."""


def matrices(deltas):
    return [samples.exact(delta) for delta in deltas]


def rounding(expected, deltas, steps, lr, weights=None):
    """Entrywise error: of the float32 result, and of gradients that are known to float64.

    A step is lr g / (|g| + 1e-8) at first, and no steeper in g later: an error e of the gradient
    moves an entry by up to 1e8 lr e a step, and hardly at all where the gradient is large. What the
    entries' errors do to later gradients is left out: it matters where gradients stay near 0.
    """
    weights = weights or [1.0] * len(deltas)
    tau = matrices(deltas)
    m, n = expected.shape
    size = sum(abs(w) * np.linalg.norm(x) for w, x in zip(weights, tau, strict=True))
    unknown = bounds.gamma(4 * (m + n), bounds.U64) * 2 * sum(map(abs, weights)) * size
    return bounds.U32 * np.abs(expected) + steps * 1e8 * lr * unknown


def assert_is_wudi(deltas, steps=STEPS, lr=LR, weights=None):
    found = spectral.merge(Wudi(steps=steps, lr=lr), deltas, weights)
    assert isinstance(found, Dense)
    expected = wudi.wudi(matrices(deltas), steps, lr, weights)
    error = np.abs(samples.exact(found) - expected)
    assert np.all(error <= rounding(expected, deltas, steps, lr, weights))


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    one_in(2, spectral.SHAPES, samples.KINDS, samples.DTYPES),
)
def test_wudi_is_the_reference(shape, kind, dtype):
    m, n = shape
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    assert_is_wudi(deltas)
    assert_is_wudi([delta.scaled(2.0**-7) for delta in deltas], steps=300, lr=1e-5)


@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 0.0, 2.0, 0.5]])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_weights_are_those_of_the_sum_and_of_the_objective(kind, weights):
    assert_is_wudi(samples.task_deltas(kind, 30, 20), weights=weights)


@samples.SEARCH
@given(samples.task_lists())
def test_every_shape_rank_and_dtype(deltas):
    assume(all(1e-3 < np.linalg.norm(tau) < 1e3 for tau in matrices(deltas)))
    assert_is_wudi(deltas, steps=1)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_more_rows_than_a_panel_has(kind):
    assert_is_wudi(samples.task_deltas(kind, 700, 120), steps=5)


def test_the_defaults_are_the_published_ones():
    assert Wudi() == Wudi(steps=300, lr=1e-5, embeddings="average")


@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_steps_are_those_of_torchs_adam(kind):
    deltas = samples.task_deltas(kind, 9, 7)
    tau = [torch.from_numpy(x) for x in matrices(deltas)]
    M = torch.nn.Parameter(sum(tau))
    optimiser = torch.optim.Adam([M], lr=LR)
    for _ in range(STEPS):
        optimiser.zero_grad()
        seen = [((M - x) @ x.T).square().sum() / x.square().sum() for x in tau]
        sum(seen).backward()
        optimiser.step()
    found = spectral.merged(Wudi(steps=STEPS, lr=LR), deltas)
    expected = M.detach().numpy()
    assert np.all(np.abs(found - expected) <= rounding(expected, deltas, STEPS, LR))


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("m", "n"), spectral.SHAPES)
def test_steps_lessen_the_interference(m, n, kind):
    deltas = samples.task_deltas(kind, m, n)
    left = [
        wudi.objective(spectral.merged(Wudi(steps=steps, lr=1e-2), deltas), matrices(deltas))
        for steps in (0, 20, 200)
    ]
    assert left[0] > 1.05 * left[1] > 1.05**2 * left[2]


def test_many_steps_lead_to_the_exact_minimum():
    deltas = samples.task_deltas("dense", 9, 7)
    exact = spectral.merged(Covariance(side="input", ridge=0.0), deltas)
    found = spectral.merged(Wudi(steps=5000, lr=3e-3), deltas)
    np.testing.assert_allclose(found, exact, atol=1e-3)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_without_steps_it_is_the_sum(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(Wudi(steps=0), deltas)
    np.testing.assert_allclose(found, sum(matrices(deltas)), rtol=1e-6, atol=1e-6)


NEAR = 5e-5
"""Five times the default lr: where gradients are rounding, Adam makes up to whole steps of it."""


@pytest.mark.parametrize("kind", samples.KINDS)
def test_one_task_is_itself(kind):
    for delta in samples.task_deltas(kind, 30, 20):
        found = spectral.merged(Wudi(), [delta])
        np.testing.assert_allclose(found, samples.exact(delta), rtol=1e-6, atol=NEAR)


@pytest.mark.parametrize("stored", ["factors", "matrices"])
def test_orthogonal_tasks_are_added(stored):
    deltas = spectral.orthogonal_tasks()
    given = deltas if stored == "factors" else spectral.as_dense(deltas)
    found = spectral.merged(Wudi(), given)
    np.testing.assert_allclose(found, sum(matrices(deltas)), atol=NEAR)


def test_tasks_without_a_delta_and_zeros_change_nothing():
    first, second = samples.low_rank(30, 20, 3, seed=1), samples.low_rank(30, 20, 3, seed=2)
    expected = spectral.merged(Wudi(steps=STEPS, lr=LR), [first, second])
    for third in (None, spectral.zero(30, 20)):
        found = spectral.merged(Wudi(steps=STEPS, lr=LR), [first, third, second])
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "zeros",
    [
        [LowRank(torch.zeros(6, 2), torch.ones(2, 5))] * 2,
        [Dense(torch.zeros(6, 5))] * 3,
        [Dense(torch.zeros(0, 4))] * 2,
    ],
)
def test_zeros_stay_zero(zeros):
    assert not spectral.merged("wudi", zeros).any()


def test_rank_deficient_deltas_are_the_reference():
    for deltas in (spectral.shared_A(), spectral.parallel_columns()):
        assert_is_wudi(deltas)


def test_vectors_and_embeddings_are_averaged():
    vectors = [{"bias": samples.dense(5, seed=t)} for t in range(3)]
    found = merge_state(vectors, "wudi", weights=[1.0, 2.0, 1.0])["bias"]
    expected = merge_state(vectors, "average", weights=[1.0, 2.0, 1.0])["bias"]
    assert torch.equal(found.tensor, expected.tensor)
    deltas = samples.task_deltas("dense")
    found = merge_one(Wudi(), deltas, is_embedding=True).delta
    assert torch.equal(found.tensor, merge_one("average", deltas).delta.tensor)
    found = merge_one(Wudi(embeddings="merge"), deltas, is_embedding=True).delta
    assert torch.equal(found.tensor, merge_one(Wudi(), deltas).delta.tensor)


@pytest.mark.parametrize("kernel", [(8, 3, 2, 2), (4, 9, 3)])
def test_kernels_are_matrices(kernel):
    deltas = [samples.dense(*kernel, seed=t) for t in range(3)]
    found = merge_state([{"k": delta} for delta in deltas], Wudi(steps=STEPS, lr=LR))["k"]
    assert found.shape == deltas[0].shape
    expected = wudi.wudi(matrices(deltas), STEPS, LR)
    assert np.all(np.abs(samples.exact(found) - expected) <= rounding(expected, deltas, STEPS, LR))


def test_negative_weights_are_refused():
    deltas = [{"w": samples.low_rank(9, 7, 2, seed=t)} for t in range(2)]
    with pytest.raises(UsageError, match="wudi: a weight is negative.*from 0 up"):
        merge_state(deltas, "wudi", weights=[1.0, -0.5])
    with pytest.raises(UsageError, match="weights sum to zero"):
        merge_state(deltas, "wudi", weights=[0.0, 0.0])


@pytest.mark.parametrize(
    "parameters", [{"steps": -1}, {"steps": 1.5}, {"lr": 0}, {"lr": -1e-5}, {"embeddings": "keep"}]
)
def test_parameters_out_of_range_are_refused(parameters):
    with pytest.raises(UsageError, match=next(iter(parameters))):
        make_method("wudi", parameters)
