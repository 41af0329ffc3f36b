"""mergekit's own methods, against references in float64 that are written from their definitions."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.mergekit.family import outlier_mask
from starmerge_models.mergekit.method import Mergekit
from tests.merge_one import merge_one
from tests.oracles import mergekit as oracle
from tests.oracles import samples

SHAPES = [(40, 30), (17,), (12, 5, 3, 3)]


def sample(shape, count, seed=0, scale=0.02):
    """A base, and models near to it, float32."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, [base + scale * torch.randn(shape, generator=generator) for _ in range(count)]


def merged(method, base, deltas, parameters=(), models=None, **options):
    """What a method makes of a tensor, and its settings."""
    chain = Mergekit(
        merge_method=method,
        settings=[
            {"parameter": name, "value": value}
            if model is None
            else {"parameter": name, "value": value, "model": model}
            for name, value, model in parameters
        ],
        **options,
    )
    found = merge_one(chain, deltas, base=base, shape=tuple(base.shape), tasks=models)
    return base.double().numpy() + found.delta.to_dense().double().numpy().reshape(base.shape)


def exact(*tensors):
    return [tensor.double().numpy() for tensor in tensors]


def close(found, expected, scale):
    """Within the one rounding of the update to float32, and that of stored differences."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 2.0**-24 * scale)


def of_each(name, values):
    return [(name, value, str(t)) for t, value in enumerate(values)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("of_weights", [True, False])
def test_multislerp_is_the_reference(shape, normalize, of_weights):
    base, models = sample(shape, 3)
    weights = [0.5, -0.2, 0.9]
    parameters = [*of_each("weight", weights), ("normalize_weights", normalize, None)]
    deltas = [Dense(model - base) for model in models]
    found = merged("multislerp", base, deltas, parameters, of_weights=of_weights)
    (start,) = exact(base)
    origin = 0.0 if of_weights else start
    x = [start + delta.tensor.double().numpy() - origin for delta in deltas]
    expected = origin + oracle.multislerp(x, weights, normalize=normalize)
    close(found, expected, np.abs(start).max() * 4)


def test_multislerp_counts_the_base_as_a_model_and_keeps_a_single_one():
    base, models = sample((9, 8), 2)
    deltas = [Dense(model - base) for model in models]
    parameters = [*of_each("weight", [0.3, 0.2]), ("weight", 0.7, "base")]
    found = merged("multislerp", base, deltas, parameters, with_base=True)
    start = exact(base)[0]
    x = [start + delta.tensor.double().numpy() for delta in deltas] + [start]
    close(found, oracle.multislerp(x, [0.3, 0.2, 0.7]), np.abs(start).max())
    alone = merged("multislerp", base, deltas[:1], of_each("weight", [0.3]))
    close(alone, x[0], np.abs(start).max())


def test_multislerp_of_directions_that_cancel():
    base, (model,) = sample((9, 8), 1)
    delta = model - base
    pair = [Dense(delta), Dense(-delta)]
    close(merged("multislerp", base, pair, of_each("weight", [1, 1])), *exact(base), 1)
    pairs = [*pair, Dense(base), Dense(-base)]
    with pytest.raises(StarmergeError, match="multislerp: .*cancel in weight"):
        merged("multislerp", base, pairs, of_each("weight", [1, 1, 0.5, 0.5]))
    nothing = [Dense(torch.zeros_like(delta))] * 3
    assert np.array_equal(
        merged("multislerp", base, nothing, of_each("weight", [1, 1, 1])), *exact(base)
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0, 1e-7, 0.005, 1])
def test_nearswap_is_the_reference(shape, t):
    base, (model,) = sample(shape, 1)
    delta = model - base
    delta.view(-1)[::3] *= 1e-6  # below the smallest difference that is divided by
    found = merged("nearswap", base, [Dense(delta)], [("t", t, None)])
    start, step = exact(base, delta)
    close(found, oracle.nearswap(start, start + step, t), np.abs(start).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["dense", "low-rank"])
def test_arcee_fusion_is_the_reference(shape, kind):
    base, (model,) = sample(shape, 1, scale=0.3)
    delta = Dense(model - base)
    if kind == "low-rank":
        base = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
        delta = LowRank(torch.randn(40, 2), torch.randn(2, 30), scale=0.1)
    found = merged("arcee_fusion", base, [delta])
    start = exact(base)[0]
    step = delta.entries().double().numpy().reshape(base.shape)
    scores, threshold = oracle.importance(start, start + step)
    near = np.isclose(scores, threshold, rtol=1e-9, atol=0)
    assert near.sum() <= 1
    assert 0.02 < (scores >= threshold).mean() < 0.4
    expected = np.where(scores >= threshold, start + step, start)
    np.testing.assert_array_equal(found[~near], expected[~near])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_ram_is_the_reference(method, shape):
    base, models = sample(shape, 3)
    (start,) = exact(base)
    deltas = [Dense(model - base) for model in models]
    raising = {} if method == "ram" else {"r": 0.4, "alpha": 0.6}
    parameters = [("epsilon", 0.015, None), *((k, v, None) for k, v in raising.items())]
    found = merged(method, base, deltas, parameters)
    steps = [delta.tensor.double().numpy() for delta in deltas]
    expected = start + oracle.ram(steps, 0.015, **raising)
    close(found, expected, np.abs(start).max())
    assert not np.allclose(expected, start + np.mean(steps, 0))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), epsilon=st.sampled_from([0, 0.01, 0.05]), r=st.floats(0, 2))
def test_raising_changes_what_a_single_model_changed(seed, epsilon, r):
    _, models = sample((6, 7), 3, seed)
    steps = [np.where(np.abs(m) > 0.5, m, 0) for m in exact(*models)]
    deltas = [Dense(torch.from_numpy(step).float()) for step in steps]
    plain = merged("ram", torch.zeros(6, 7), deltas, [("epsilon", epsilon, None)])
    raised = merged(
        "ramplus_tl",
        torch.zeros(6, 7),
        deltas,
        [("epsilon", epsilon, None), ("r", r, None), ("alpha", 1, None)],
    )
    several = sum(np.abs(step) > epsilon for step in steps) > 1
    np.testing.assert_array_equal(plain[several], raised[several])
    assert np.all(np.abs(raised) >= np.abs(plain))


def test_passthrough_scales_the_weights():
    base, (model,) = sample((6, 5), 1)
    start, tuned = exact(base, model)
    delta = [Dense(model - base)]
    close(merged("passthrough", base, delta), tuned, np.abs(start).max())
    close(merged("passthrough", base, delta, [("scale", 0.25, "0")]), 0.25 * tuned, 4)
    assert not merged("passthrough", base, [Dense(base * 0)], [("scale", 0, "0")]).any()


@pytest.mark.parametrize("gamma", [0, 0.01, 0.05])
@pytest.mark.parametrize("count", [3, 16, 99, 400])
def test_no_outlier_is_dropped_of_few_entries(count, gamma):
    delta = samples.task_deltas("dense", count, 1)[0].tensor.float().reshape(count, 1)
    mask = outlier_mask(delta, 0.5, gamma).numpy()
    assert mask.sum() == count // 2
    top = np.argsort(-np.abs(delta.numpy()).ravel())
    dropped = int(gamma * count)
    assert not mask.ravel()[top[:dropped]].any()
    assert mask.ravel()[top[dropped : dropped + count // 2]].all()


def test_what_a_method_of_one_model_is_given():
    base, models = sample((4, 4), 2)
    deltas = [Dense(model - base) for model in models]
    for method in ("nearswap", "arcee_fusion", "passthrough"):
        with pytest.raises(UsageError, match=f"{method}: there are 2 models .*exactly one"):
            merged(method, base, deltas)
    refuse = partial(pytest.raises, UsageError)
    with refuse(match="greater than or equal to 0"):
        Mergekit(merge_method="nearswap", settings=[{"parameter": "t", "value": -1}])
    with refuse(match="does not use the parameter 't'"):
        Mergekit(merge_method="ram", settings=[{"parameter": "t", "value": 1}])
