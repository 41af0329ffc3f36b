"""Two-sided shares against their float64 reference, and what a share means."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.in_memory import merge_state
from starmerge_models.methods import Shares, make_method
from starmerge_models.methods import own_response as own_response_rule
from tests.merge_one import merge_one
from tests.oracles import bounds, metric, own_response, samples, shares, spectral
from tests.products import one_in

WEIGHTS = [1.0, 0.5, 2.0, 4.0]


def matrices(deltas):
    return [samples.exact(delta) for delta in deltas]


def scaled(merged, deltas, response, weights=None):
    """The merge of one tensor, with the factor that gives the mean own response."""
    tau = [{"weight": delta} for delta in deltas]
    return own_response.factor(tau, {"weight": merged}, response, weights) * merged


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "power", "ridge"),
    one_in(3, spectral.SHAPES, samples.KINDS, samples.DTYPES, [0.5, 0.7, 1.0], [0.1, 1.0]),
)
def test_shares_are_the_reference(shape, kind, dtype, power, ridge):
    m, n = shape
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    found = spectral.merged(Shares(power=power, ridge=ridge, response=0.6), deltas)
    expected = scaled(shares.shares(matrices(deltas), power, ridge), matrices(deltas), 0.6)
    spectral.assert_close(found, expected, deltas)


@samples.SEARCH
@given(samples.task_lists(), st.sampled_from([0.5, 1.0]))
def test_every_shape_rank_and_dtype(deltas, power):
    tau = matrices(deltas)
    norms = [np.linalg.norm(delta) for delta in tau if np.any(delta)]
    assume(norms and min(norms) > 1e-11 * max(norms))  # below that it counts as zero
    for delta, norm in zip((d for d in tau if np.any(d)), norms, strict=True):
        # None of the spectra ends so near to rounding that the rank is open.
        values = np.linalg.svd(delta, compute_uv=False) / norm
        assume(not np.any((values > 1e-13) & (values < 1e-5)))
    merged = shares.shares(tau, power)
    mean = own_response.mean_response([{"weight": d} for d in tau], {"weight": merged})
    whole = np.sqrt(np.sum(np.square(tau)))
    assume(mean * whole > 1e-3 * np.linalg.norm(merged))
    size = np.linalg.norm(merged) / mean / sum(norms)  # of the merge, over all task vectors
    assume(not 0.99 * own_response_rule.LARGEST < size < 1.01 * own_response_rule.LARGEST)
    if size > own_response_rule.LARGEST:
        with pytest.raises(StarmergeError, match="times as large as all task vectors together"):
            spectral.merged(Shares(power=power, response=1.0), deltas)
        return
    found = spectral.merged(Shares(power=power, response=1.0), deltas)
    expected = scaled(merged, tau, 1.0)
    # The responses are those of the update in float32: <dM, tau_t> <= u |M| |tau_t|.
    factor = bounds.U32 * np.linalg.norm(merged) * sum(norms) / whole**2 / mean
    error = np.linalg.norm(found - expected) - 2 * factor * np.linalg.norm(expected)
    assert error <= 4 * spectral.rounding(expected, deltas, 1e8)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_weights_divide_what_several_tasks_use(kind, power):
    deltas = samples.task_deltas(kind, 30, 20)
    for weights in (WEIGHTS, [1.0, 0.0, 2.0, 4.0]):
        found = spectral.merged(Shares(power=power, response=0.9), deltas, weights)
        merged = shares.shares(matrices(deltas), power, weights=weights)
        kept = [
            d if w else np.zeros_like(d) for w, d in zip(weights, matrices(deltas), strict=True)
        ]
        spectral.assert_close(found, scaled(merged, kept, 0.9, weights), deltas, times=2)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_a_common_factor_of_the_weights_cancels(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merged(Shares(), deltas, [8.0 * w for w in WEIGHTS])
    expected = spectral.merged(Shares(), deltas, WEIGHTS)
    spectral.assert_close(found, expected, deltas, times=2)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_one_task_comes_back_at_full_strength(kind, power):
    for delta in samples.task_deltas(kind, 30, 20):
        found = spectral.merged(Shares(power=power), [delta])
        spectral.assert_close(found, samples.exact(delta), [delta], times=2)
        found = spectral.merged(Shares(power=power), [delta], [2.0])
        spectral.assert_close(found, samples.exact(delta), [delta], times=2)


def shrunk(delta, power, copies=1):
    """A task of which there are some copies: the ridge leaves a part of each direction.

    sigma_k becomes sigma_k (s^2 / (s^2 + 0.1 * mean))^p on either side, s^2 being its share of
    |delta|^2, and the mean eigenvalue that of the copies over their directions.
    """
    U, sigma, Vt = np.linalg.svd(delta, full_matrices=False)
    rank = int(np.sum(sigma > 1e-9 * sigma[0]))
    kept, s2 = sigma[:rank], copies * sigma[:rank] ** 2 / np.sum(sigma**2)
    for side in delta.shape:
        kept = kept * (s2 / (s2 + 0.1 * copies / min(side, copies * rank))) ** power
    return (U[:, :rank] * kept) @ Vt[:rank]


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_copies_of_one_task_are_that_task_but_for_the_ridge(kind, copies, power):
    delta = samples.task_deltas(kind, 30, 20)[3]
    exact = samples.exact(delta)
    found = spectral.merged(Shares(power=power, ridge=0.0, response=1.0), [delta] * copies)
    spectral.assert_close(found, exact, [delta] * copies, condition=1e6)
    found = spectral.merged(Shares(power=power, response=1.0), [delta] * copies)
    expected = scaled(shrunk(exact, power, copies), [exact], 1.0)
    spectral.assert_close(found, expected, [delta] * copies, times=2)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_orthogonal_tasks_come_back_untouched_but_for_the_ridge(power):
    deltas = spectral.orthogonal_tasks()
    expected = sum(matrices(deltas))
    found = spectral.merged(Shares(power=power, ridge=0.0, response=1.0), deltas)
    spectral.assert_close(found, expected, deltas, condition=1e6)
    found = spectral.merged(Shares(power=power, response=1.0), deltas)
    expected = sum(shrunk(delta, power) for delta in matrices(deltas))
    spectral.assert_close(found, scaled(expected, matrices(deltas), 1.0), deltas, times=2)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_rotations_and_factors_go_through(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    Q, R = samples.orthogonal(30, seed=5), samples.orthogonal(20, seed=6)
    turned = [Dense(torch.from_numpy(-3.0 * Q @ delta @ R)) for delta in matrices(deltas)]
    found = spectral.merged(Shares(), turned)
    expected = -3.0 * Q @ spectral.merged(Shares(), deltas) @ R
    spectral.assert_close(found, expected, turned, times=8)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_order_of_the_tasks_does_not_matter(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    order = [2, 0, 3, 1]
    found = spectral.merged(Shares(), [deltas[t] for t in order], [WEIGHTS[t] for t in order])
    spectral.assert_close(found, spectral.merged(Shares(), deltas, WEIGHTS), deltas, times=2)


def many(m, n, *, tasks, rank):
    """Adapters of which one is zero and one is all rounding; and some weights."""
    deltas = [samples.low_rank(m, n, rank, seed=t, scale=1.0 + t % 3) for t in range(tasks)]
    B, A = samples.normal(m, 1, seed=98), samples.normal(1, n, seed=99)
    deltas[1] = spectral.zero(m, n)
    deltas[2] = LowRank(torch.cat([B, -B], 1), torch.cat([A, A]))
    return deltas, [(1.0, 0.5, 2.0, 4.0, 1.0)[t % 5] for t in range(tasks)]


MANY = [(30, 20, 16, 4), (12, 40, 16, 3), (30, 50, 80, 8)]
"""m, n, tasks and rank: the ranks add up to more than both sides, the last ones to two blocks."""


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("m", "n", "tasks", "rank"), MANY)
def test_many_adapters_are_the_reference(m, n, tasks, rank, is_weighted, power):
    deltas, weights = many(m, n, tasks=tasks, rank=rank)
    weights = weights if is_weighted else None
    tau = [delta if t != 2 else np.zeros((m, n)) for t, delta in enumerate(matrices(deltas))]
    merged = shares.shares(tau, power, weights=weights)
    factor = shares.factor([{"w": delta} for delta in tau], {"w": merged}, weights)
    found = spectral.merged(Shares(power=power), deltas, weights)
    spectral.assert_close(found, factor * merged, deltas, times=2)
    found = spectral.merged(Shares(power=power, response=0.2), deltas, weights)
    spectral.assert_close(found, scaled(merged, tau, 0.2, weights), deltas, times=4)


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("m", "n", "tasks", "rank"), MANY)
def test_many_adapters_in_whitened_inputs_are_the_reference(m, n, tasks, rank, is_weighted, side):
    deltas, weights = many(m, n, tasks=tasks, rank=rank)
    weights = weights if is_weighted else [1.0] * tasks
    inputs, sigma = metric.inputs_of(n if side == "columns" else m, side=side)
    found = samples.exact(merge_one(Shares(), deltas, weights=weights, inputs=inputs).delta)
    tau = [delta if t != 2 else np.zeros((m, n)) for t, delta in enumerate(matrices(deltas))]

    def reference(whitened):
        merged = shares.shares(whitened, 0.5, weights=weights)
        models = [{"w": delta} for delta in whitened]
        return shares.factor(models, {"w": merged}, weights) * merged

    expected = metric.in_whitened_inputs(reference, tau, sigma, side)
    values = np.linalg.eigvalsh(metric.ridged(sigma))
    condition = float(np.sqrt(values[-1] / values[0]))
    spectral.assert_close(found, expected, deltas, times=2 * condition)


def test_many_adapters_merge_as_one_after_the_other_and_as_matrices():
    """Whether there are factors or matrices, and however the tasks are put together in blocks."""
    deltas, weights = many(60, 50, tasks=90, rank=6)
    found = spectral.merged(Shares(), deltas, weights)
    turned = spectral.merged(Shares(), deltas[::-1], weights[::-1])
    spectral.assert_close(turned, found, deltas, times=2)
    del deltas[2], weights[2]  # its rounding would be a task of its own
    as_matrices = spectral.merged(Shares(), spectral.as_dense(deltas), weights)
    spectral.assert_close(as_matrices, found, deltas, times=2)


@pytest.mark.parametrize("m, n", spectral.SHAPES)
def test_factors_and_matrices_merge_alike(m, n):
    deltas = samples.task_deltas("low-rank", m, n)
    found = spectral.merged(Shares(), spectral.as_dense(deltas))
    spectral.assert_close(found, spectral.merged(Shares(), deltas), deltas, times=2)


def test_one_factor_for_the_whole_model():
    first = samples.task_deltas("low-rank", 30, 20)
    second = [delta.scaled(0.25) for delta in samples.task_deltas("mixed", 12, 40, seed=100)]
    models = [{"first": a, "second": b} for a, b in zip(first, second, strict=True)]
    del models[1]["first"], models[2]["second"]
    found = merge_state(models, Shares(response=0.6))
    tau = [{name: samples.exact(delta) for name, delta in model.items()} for model in models]
    merged = {
        name: shares.shares([model[name] for model in tau if name in model]) for name in found
    }
    full = [{name: model.get(name, 0 * merged[name]) for name in merged} for model in tau]
    factor = own_response.factor(full, merged, 0.6)
    for name, delta in found.items():
        deltas = [model[name] for model in models if name in model]
        spectral.assert_close(samples.exact(delta), factor * merged[name], deltas, times=2)


def test_vectors_are_averaged_and_have_no_part_in_the_factor():
    deltas = samples.task_deltas("low-rank", 30, 20)
    models = [{"w": delta, "b": samples.dense(5, seed=t)} for t, delta in enumerate(deltas)]
    found = merge_state(models, Shares(response=0.5))
    expected = sum(samples.exact(model["b"]) for model in models) / 4
    np.testing.assert_allclose(samples.exact(found["b"]), expected, rtol=0, atol=1e-6)
    alone = spectral.merged(Shares(response=0.5), deltas)
    np.testing.assert_array_equal(samples.exact(found["w"]), alone)


def test_models_that_do_nothing():
    zeros = [spectral.zero(30, 20)] * 3
    assert not spectral.merged(Shares(), zeros).any()
    deltas = samples.task_deltas("low-rank", 30, 20)
    found = spectral.merged(Shares(response=0.7), [*deltas, zeros[0], None])
    spectral.assert_close(found, spectral.merged(Shares(response=0.7), deltas), deltas)
    alone = spectral.merged(Shares(), [deltas[0], zeros[0]])
    spectral.assert_close(alone, samples.exact(deltas[0]), deltas, times=2)


@pytest.mark.parametrize("weights", [None, WEIGHTS, [1.0, 0.0, 2.0, 4.0]])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_default_factor_is_the_reference(kind, weights):
    first = samples.task_deltas(kind, 30, 20)
    second = [delta.scaled(0.25) for delta in samples.task_deltas(kind, 12, 40, seed=100)]
    models = [{"first": a, "second": b} for a, b in zip(first, second, strict=True)]
    del models[1]["first"], models[2]["second"]
    models[3]["zero"] = spectral.zero(9, 7)
    found = merge_state(models, Shares(), weights=weights)
    tau = [{name: samples.exact(delta) for name, delta in model.items()} for model in models]
    merged = {}
    for name in found:
        own = [t for t, model in enumerate(tau) if name in model]
        of = [weights[t] for t in own] if weights else None
        merged[name] = shares.shares([tau[t][name] for t in own], weights=of)
    factor = shares.factor(tau, merged, weights)
    for name, delta in found.items():
        deltas = [model[name] for model in models if name in model]
        spectral.assert_close(samples.exact(delta), factor * merged[name], deltas, times=4)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_tasks_that_agree_or_have_nothing_in_common_are_not_scaled_down(copies):
    delta = samples.task_deltas("low-rank", 30, 20)[3]
    found = spectral.merged(Shares(ridge=0.0), [delta] * copies)
    spectral.assert_close(found, samples.exact(delta), [delta] * copies, condition=1e6)
    apart = spectral.orthogonal_tasks(tasks=1 + copies)
    found = spectral.merged(Shares(ridge=0.0), apart)
    spectral.assert_close(found, sum(matrices(apart)), apart, condition=1e6)


def test_tasks_that_disagree_are_scaled_down():
    deltas = [samples.low_rank(30, 20, 8, seed=t) for t in range(8)]
    whole = spectral.merged(Shares(response=1.0), deltas)
    assert np.linalg.norm(spectral.merged(Shares(), deltas)) < 0.95 * np.linalg.norm(whole)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_nearly_equal_tasks_are_not_blown_up(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    near = [Dense(torch.from_numpy(samples.exact(d) * (1 + 1e-6) + 1e-9)) for d in deltas]
    found = spectral.merged(Shares(response=1.0), [*deltas, *near])
    alone = spectral.merged(Shares(response=1.0), deltas)
    assert np.linalg.norm(found - alone) < 0.2 * np.linalg.norm(alone)


def test_negative_weights_are_refused():
    deltas = samples.task_deltas("low-rank")
    with pytest.raises(UsageError, match="a weight is negative"):
        spectral.merge(Shares(), deltas, [1, -1, 1, 1])


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("power", 0.4), ("power", 1.1), ("ridge", -1), ("response", 0), ("response", "much")],
)
def test_parameters_out_of_range_are_refused(parameter, value):
    with pytest.raises(UsageError, match=parameter):
        make_method("shares", {parameter: value})


def test_factors_that_are_huge_or_tiny():
    deltas = [LowRank(d.B, d.A, d.scale * 1e6) for d in samples.task_deltas("low-rank", 30, 20)]
    deltas[1] = LowRank(deltas[1].B, deltas[1].A, 1e-8)
    found = spectral.merged(Shares(), deltas)
    assert np.all(np.isfinite(found))


@pytest.mark.parametrize("ratio", [1e5, 1e10, 1e20])
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_a_task_that_is_tiny_beside_another_stops_no_merge(kind, ratio):
    for seed in range(8):
        large, small = (
            samples.task_deltas(kind, 40, 30, seed=2 * seed + 50 * t)[t] for t in (0, 1)
        )
        found = spectral.merged(Shares(), [large, small.scaled(1 / ratio)])
        assert np.all(np.isfinite(found))


def test_a_task_whose_factors_cancel_has_no_part_in_the_factor():
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(30, 2, generator=generator), torch.randn(2, 20, generator=generator)
    rounding = LowRank(torch.cat([B, -B], 1), torch.cat([A, A]))
    deltas = samples.task_deltas("low-rank", 30, 20)
    found = spectral.merged(Shares(), [rounding, *deltas])
    spectral.assert_close(found, spectral.merged(Shares(), deltas), deltas, times=2)


def test_tasks_that_oppose_each_other_leave_the_scale():
    rng = np.random.default_rng(16)
    for _ in range(400):
        tau = [np.diag(rng.standard_normal(4) * 10 ** rng.uniform(-1, 1, 4)) for _ in range(3)]
        merged = shares.shares(tau, 0.5)
        agreement = sum(np.sum(merged * delta) for delta in tau)
        if agreement < -1e-3 * np.sum(np.square(tau)):
            break
    else:
        raise AssertionError("no such tasks were drawn")
    found = spectral.merged(Shares(), [Dense(torch.from_numpy(delta)) for delta in tau])
    np.testing.assert_allclose(found, merged, rtol=1e-5, atol=1e-6 * np.linalg.norm(merged))


def test_no_factor_gives_tasks_that_oppose_each_other_a_positive_response():
    rng = np.random.default_rng(16)
    found = 0
    for _ in range(400):
        tau = [np.diag(rng.standard_normal(4) * 10 ** rng.uniform(-1, 1, 4)) for _ in range(3)]
        merged = shares.shares(tau, 0.5)
        mean = own_response.mean_response([{"w": delta} for delta in tau], {"w": merged})
        if mean < -1e-3:
            deltas = [Dense(torch.from_numpy(delta)) for delta in tau]
            with pytest.raises(StarmergeError, match=r"no positive factor makes it 0\.7\. Leave"):
                spectral.merged(Shares(response=0.7), deltas)
            found += 1
    assert found


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_a_task_that_turns_into_the_opposite_of_another_takes_its_strength_away_gradually(kind):
    delta = samples.task_deltas(kind, 40, 30)[0]
    exact = samples.exact(delta)
    strengths = []
    for part in (0.0, 0.5, 0.9, 0.99, 0.999, 1.0):
        found = spectral.merged(Shares(), [delta, delta.scaled(-part)])
        strengths.append(np.sum(found * exact) / np.sum(exact**2))
    assert strengths == sorted(strengths, reverse=True)
    assert strengths[0] == pytest.approx(1.0, abs=1e-6)
    assert strengths[3:] == pytest.approx([0.0, 0.0, 0.0], abs=0.02)


@pytest.mark.parametrize("copies", [1, 3, 7])
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_small_copies_of_a_task_leave_it_whole(kind, copies):
    delta = samples.task_deltas(kind, 40, 30)[0]
    found = spectral.merged(Shares(ridge=0.0), [delta, *[delta.scaled(1e-3)] * copies])
    exact = samples.exact(delta)
    assert np.linalg.norm(found - exact) <= 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("ratio", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_a_small_task_does_not_take_strength_from_a_large_one(kind, ratio):
    large, small = samples.task_deltas(kind, 40, 30)[:2]
    found = spectral.merged(Shares(), [large, small.scaled(1 / ratio)])
    exact = samples.exact(large)
    strength = np.sum(found * exact) / np.sum(exact**2)
    assert 0.6 < strength < 1.2
    expected = shares.shares([exact, samples.exact(small) / ratio], 0.5)
    models = [{"weight": exact}, {"weight": samples.exact(small) / ratio}]
    factor = shares.factor(models, {"weight": expected})
    spectral.assert_close(found, factor * expected, [large, small], times=4)


@pytest.mark.parametrize("chain", ["shares", "covariance+own_response"])
def test_what_rounding_leaves_of_opposed_adapters_is_not_blown_up(chain):
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(shape, generator=generator) for shape in ((50, 3), (3, 40)))
    Q = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    turned = LowRank((B.double() @ Q).float(), (-Q.T @ A.double()).float())
    deltas = [{"weight": LowRank(B, A)}, {"weight": turned}]
    if chain == "shares":
        left = merge_state(deltas, chain)["weight"].frobenius()
        assert left < 1e-5 * turned.frobenius()
    else:
        with pytest.raises(StarmergeError, match="look for tasks that cancel"):
            merge_state(deltas, chain)


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_a_tensor_of_one_task_has_its_own_strength_whatever_the_weight(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    alone = samples.task_deltas(kind, 12, 40, seed=100)[1]
    models = [{"w": delta} for delta in deltas]
    models[2]["alone"] = alone  # of weight 2
    found = merge_state(models, Shares(response=0.6), weights=WEIGHTS)
    tau = [{name: samples.exact(delta) for name, delta in model.items()} for model in models]
    merged = {"w": shares.shares(matrices(deltas), weights=WEIGHTS), "alone": tau[2]["alone"]}
    full = [{name: model.get(name, 0 * merged[name]) for name in merged} for model in tau]
    factor = own_response.factor(full, merged, 0.6, WEIGHTS)
    spectral.assert_close(samples.exact(found["alone"]), factor * merged["alone"], [alone], times=4)
