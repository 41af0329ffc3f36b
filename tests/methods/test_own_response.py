"""The own-response scale against its float64 reference, over models of several tensors."""

import numpy as np
import pytest
import torch

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.in_memory import merge_state
from starmerge_models.methods import make_pipeline
from tests.oracles import bounds, own_response, samples, spectral
from tests.products import one_in

MERGES = ["task_arithmetic", "average", "iso_c", "covariance", "tsv_m", "metagpt"]


def models(kind, dtype=torch.float32):
    """Four tasks of three tensors; two of them leave one alone."""
    first = samples.task_deltas(kind, 30, 20, dtype=dtype)
    second = [delta.scaled(0.25) for delta in samples.task_deltas(kind, 12, 40, seed=100)]
    found = [{"first": a, "second": b} for a, b in zip(first, second, strict=True)]
    for t, model in enumerate(found):
        if kind != "low-rank":
            model["bias"] = samples.dense(7, seed=t, dtype=dtype)
    del found[1]["first"], found[2]["second"]
    return found


def exact(model, names):
    """The arrays of a model by name, zeros where it has no delta; names gives the shapes."""
    return {
        name: samples.exact(model[name]) if name in model else np.zeros(delta.shape)
        for name, delta in names.items()
    }


@pytest.mark.parametrize(
    ("kind", "dtype", "weights", "merge"),
    one_in(2, samples.KINDS, samples.DTYPES, [None, [1.0, 0.5, 2.0, 0.0]], MERGES),
)
def test_own_response_is_the_reference(kind, dtype, weights, merge):
    deltas = models(kind, dtype)
    merged = merge_state(deltas, merge, weights=weights)
    chain = make_pipeline(f"{merge}+own_response", {"own_response.c": 0.6})
    found = merge_state(deltas, chain, weights=weights)
    M = exact(merged, merged)
    tau = [exact(model, merged) for model in deltas]
    expected = own_response.own_response(tau, M, 0.6, weights)
    # The factor is known to float64; a matrix meets two roundings, of it and of the product.
    for name, delta in found.items():
        error = np.abs(samples.exact(delta) - expected[name])
        stored = bounds.gamma(2, bounds.U32) if isinstance(delta, Dense) else 0.0
        size = np.linalg.norm(expected[name])
        assert np.all(error <= stored * np.abs(expected[name]) + 1e-11 * size)
    after = own_response.mean_response(tau, exact(found, found), weights)
    assert after == pytest.approx(0.6, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_default_is_the_eighth_root_of_the_number_of_tasks_that_do_something(count):
    deltas = samples.task_deltas("low-rank", 30, 20)[:count]
    found = spectral.merged("covariance+own_response", [*deltas, spectral.zero(30, 20), None])
    tau = [{"w": samples.exact(delta)} for delta in deltas]
    after = own_response.mean_response(tau, {"w": found})
    assert after == pytest.approx(count ** (-1 / 8), rel=1e-6)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_scale_of_the_merge_does_not_matter(kind):
    deltas = [{name: model[name] for name in model if name != "bias"} for model in models(kind)]
    expected = merge_state(deltas, "iso_c+own_response")
    for factor in (16.0, 0.001):
        found = merge_state(deltas, make_pipeline("iso_c+own_response", {"alpha": factor}))
        for key, delta in expected.items():
            size = np.linalg.norm(samples.exact(delta))
            difference = np.linalg.norm(samples.exact(found[key]) - samples.exact(delta))
            # Each of the two is rounded as it is merged, and as a matrix when it is scaled.
            assert difference <= 20 * bounds.U32 * size


def test_tasks_without_a_delta_do_not_count():
    deltas = models("low-rank")
    expected = merge_state(deltas, "task_arithmetic+own_response")
    zeros = {"first": spectral.zero(30, 20), "second": spectral.zero(12, 40)}
    for extra in ({}, zeros):
        found = merge_state([*deltas, extra], "task_arithmetic+own_response")
        for name, delta in expected.items():
            size = np.linalg.norm(samples.exact(delta))
            difference = np.linalg.norm(samples.exact(found[name]) - samples.exact(delta))
            assert difference <= 1e-6 * size


def test_a_task_whose_factors_cancel_does_not_count():
    b, a = samples.normal(30, 1, seed=1), samples.normal(1, 20, seed=2)
    cancelling = LowRank(torch.cat([b, b, -2 * b], 1), 0.1 * a.repeat(3, 1))
    deltas = [samples.low_rank(30, 20, 3, seed=t) for t in range(3)]
    # The average would divide by four: what the step gives does not depend on that.
    expected = spectral.merged("average+own_response", deltas)
    found = spectral.merged("average+own_response", [*deltas, cancelling])
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_one_task_gets_c_of_itself():
    delta = samples.low_rank(30, 20, 4)
    chain = make_pipeline("average+own_response", {"c": 0.75})
    found = spectral.merged(chain, [delta])
    np.testing.assert_allclose(found, 0.75 * samples.exact(delta), rtol=1e-10, atol=1e-12)


def test_the_responses_are_to_the_models_and_not_to_what_transforms_left_of_them():
    deltas = models("low-rank")
    found = merge_state(deltas, make_pipeline("star+average+own_response", {"c": 0.75}))
    tau = [exact(model, found) for model in deltas]
    assert own_response.mean_response(tau, exact(found, found)) == pytest.approx(0.75, rel=1e-6)


def test_factors_and_matrices_find_one_factor():
    deltas = models("low-rank")
    full = [
        {name: spectral.as_dense([delta])[0] for name, delta in model.items()} for model in deltas
    ]
    for merge in MERGES:
        factored = merge_state(deltas, f"{merge}+own_response")
        whole = merge_state(full, f"{merge}+own_response")
        for name, delta in factored.items():
            difference = samples.exact(delta) - samples.exact(whole[name])
            assert np.linalg.norm(difference) <= 1e-6 * np.linalg.norm(samples.exact(delta))


def test_a_merge_that_answers_no_task_is_refused():
    delta = samples.low_rank(9, 7, 2)
    opposite = [{"w": delta}, {"w": delta.scaled(-1.0)}]
    with pytest.raises(StarmergeError, match=r"own_response: the mean response .* is .*Leave"):
        merge_state(opposite, "average+own_response")
    with pytest.raises(StarmergeError, match="is -0.4,"):
        merge_state([{"w": delta}], make_pipeline("task_arithmetic+own_response", {"alpha": -0.4}))


@pytest.mark.parametrize(
    "zero", [LowRank(torch.zeros(4, 2), torch.ones(2, 3)), Dense(torch.zeros(4, 3))]
)
def test_nothing_but_zeros_is_refused(zero):
    with pytest.raises(StarmergeError, match="is 0,"):
        merge_state([{"w": zero}] * 2, "average+own_response")


def test_a_merge_that_disagrees_with_one_task_only_is_not_refused():
    first, second = samples.low_rank(9, 7, 2, seed=1), samples.low_rank(9, 7, 2, seed=2)
    deltas = [{"w": first}, {"w": second}, {"w": second.scaled(-0.75)}]
    found = merge_state(deltas, make_pipeline("average+own_response", {"c": 0.75}))
    tau = [exact(model, found) for model in deltas]
    assert own_response.mean_response(tau, exact(found, found)) == pytest.approx(0.75, rel=1e-6)


@pytest.mark.parametrize("c", [0, -0.5])
def test_c_must_be_positive(c):
    with pytest.raises(
        UsageError, match="c: Input should be 'auto' or Input should be greater than 0"
    ):
        make_pipeline("average+own_response", {"c": c})


@pytest.mark.parametrize("weights", [[1, -1, 0], [1, -0.9, 0], [0.1, 0.2, -0.3]])
def test_what_is_negated_counts_for_what_it_is(weights):
    deltas = [{"w": samples.low_rank(9, 7, 2, seed=seed)} for seed in range(3)]
    found = merge_state(deltas, "task_arithmetic+own_response", weights=weights)
    tau = [exact(model, found) for model in deltas]
    mean = own_response.mean_response(tau, exact(found, found), weights)
    assert mean == pytest.approx(sum(w != 0 for w in weights) ** (-1 / 8), rel=1e-6)


def test_weights_that_are_all_zero_are_refused():
    deltas = [{"w": samples.low_rank(9, 7, 2, seed=seed)} for seed in range(3)]
    with pytest.raises(StarmergeError, match="own_response: the mean response .* is 0,"):
        merge_state(deltas, "task_arithmetic+own_response", weights=[0, 0, 0])


@pytest.mark.parametrize("merge", ["tsv_m", "iso_c", "average", "covariance"])
@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_a_small_task_does_not_take_strength_from_a_large_one(kind, merge):
    large, small = samples.task_deltas(kind, 40, 30)[:2]
    strengths = []
    for ratio in (30.0, 1e4):
        chain = make_pipeline(f"{merge}+own_response", {"own_response.c": 0.9})
        found = spectral.merged(chain, [large, small.scaled(1 / ratio)])
        exact_large = samples.exact(large)
        strengths.append(np.sum(found * exact_large) / np.sum(exact_large**2))
    assert strengths == pytest.approx([0.9, 0.9], abs=0.05)


def test_a_merge_that_overflows_is_refused():
    chain = make_pipeline("task_arithmetic+own_response", {"alpha": 1e39})
    with pytest.raises(StarmergeError, match="own_response: the mean response .* is inf,"):
        merge_state([{"w": samples.dense(9, 7)}], chain)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_rounding_leaves_of_a_task_and_its_opposite_is_not_blown_up(stored):
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(shape, generator=generator) for shape in ((50, 3), (3, 40)))
    B, A = B.to(stored).float(), A.to(stored).float()
    for seed in range(8):
        Q = torch.from_numpy(samples.orthogonal(3, seed=seed))
        turned = LowRank(
            (B.double() @ Q).to(stored).float(), (-Q.T @ A.double()).to(stored).float()
        )
        deltas = [{"weight": LowRank(B, A)}, {"weight": turned}]
        for merge in ("tsv_m", "covariance", "iso_c", "average"):
            try:
                found = merge_state(deltas, f"{merge}+own_response")["weight"].frobenius()
            except StarmergeError as error:
                assert "look for tasks that cancel" in str(error)
            else:
                assert found <= 20 * turned.frobenius()
