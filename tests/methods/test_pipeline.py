"""Chains: their names and parameters, their order, and what each step gets to see."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from starmerge_models import Average, Dense, LowRank, Star, TaskArithmetic, merge_state
from starmerge_models.errors import UsageError
from starmerge_models.mergekit.method import Mergekit
from starmerge_models.methods import (
    METHODS,
    Dare,
    Deltas,
    Karcher,
    Linear,
    NuSlerp,
    OwnResponse,
    Pipeline,
    Scale,
    Slerp,
    Svc,
    TensorContext,
    Ties,
    Trim,
    as_pipeline,
    make_pipeline,
)
from tests.merge_one import merge_one
from tests.oracles import bounds, linear, samples, star, ties
from tests.oracles import deltas as oracle


def assert_close(found, expected, deltas):
    sizes = sum(oracle.frobenius(bounds.magnitude(delta)) for delta in deltas)
    difference = oracle.frobenius(samples.values(found) - expected)
    assert difference <= bounds.gamma(64, bounds.U32) * sizes


def test_a_name_is_a_chain():
    chain = make_pipeline("star+ties+scale", {"eta": 50, "k": 30, "scale.factor": 2})
    assert chain == Pipeline((Star(eta=50),), Ties(k=30), (Scale(factor=2),))
    assert chain.name == "star+ties+scale"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("star", Pipeline((Star(),), Average())),
        ("star+average", Pipeline((Star(),), Average())),
        ("average", Pipeline((), Average())),
        ("dare+trim", Pipeline((Dare(), Trim()), Average())),
        ("svc", Pipeline((), Average(), (Svc(),))),
        (" star + svc ", Pipeline((Star(),), Average(), (Svc(),))),
    ],
)
def test_a_chain_without_a_merge_averages(name, meant):
    assert make_pipeline(name) == meant
    assert make_pipeline(meant.name, meant.parameters()) == meant


def test_methods_and_chains_become_chains():
    assert as_pipeline(Star(eta=3)) == make_pipeline("star", {"eta": 3})
    assert as_pipeline("ties") == Pipeline.of([Ties()])
    chain = make_pipeline("star+ties")
    assert as_pipeline(chain) is chain


@pytest.mark.parametrize("name", ["star", "star+ties", "dare+task_arithmetic", "trim+ties+scale"])
def test_the_parameters_make_the_chain_again(name):
    chain = make_pipeline(name)
    assert make_pipeline(chain.name, chain.parameters()) == chain


def test_parameters_are_qualified_where_there_are_several_methods():
    assert make_pipeline("ties").parameters()["lambda"] == 1.0
    assert make_pipeline("dare+ties").parameters() == {
        "dare.p": 0.5,
        "dare.seed": 0,
        "ties.k": 20.0,
        "ties.scope": "global",
        "ties.lambda": 1.0,
        "ties.zero_sign": "majority",
    }


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("ties+star", {}, "the order is transforms, one merge, post-steps"),
        ("svc+average", {}, "the order is transforms, one merge, post-steps"),
        ("ties+average", {}, "ties and average both are"),
        ("star+star", {}, "star stands there twice"),
        ("star+tis", {}, "No method is called 'tis'. Did you mean 'ties'?"),
        ("star+", {}, "No method is called ''"),
        ("trim+ties", {"k": 10}, "Say trim.k or ties.k"),
        ("trim+ties", {"dare.p": 0.5}, "'dare.p' is a parameter of no method of the chain"),
        ("star+ties", {"star.k": 3}, "no parameter 'star.k'"),
        ("star+ties", {"eta": 40, "star.eta": 30}, "'eta' is given twice"),
        ("star+ties", {"etaa": 40}, "Did you mean 'eta'?"),
        ("star+ties", {"k": 0}, "'ties': k: Input should be greater than 0"),
        ("star", {"eta": [40, 0]}, "eta.1: Input should be greater than 0"),
        ("star", {"eta": {"*": 101}}, "eta.*: Input should be less than or equal to 100"),
    ],
)
def test_a_wrong_chain_is_refused(name, parameters, message):
    with pytest.raises(UsageError) as error:
        make_pipeline(name, parameters)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_star_then_ties_is_ties_of_the_truncated(kind):
    deltas = samples.task_deltas(kind)
    truncated = [merge_one(Star(eta=60), [delta]).delta for delta in deltas]
    expected = ties.ties([{"w": delta.entries().double().numpy()} for delta in truncated], k=30)
    found = merge_one(make_pipeline("star+ties", {"eta": 60, "k": 30}), deltas)
    assert_close(found.delta, expected["w"], deltas)
    assert [truncation.rank for truncation in found.truncations] == [
        star.kept_rank(oracle.singular_values(samples.exact(delta)), 60) for delta in deltas
    ]


@pytest.mark.parametrize("kind", samples.KINDS)
def test_star_then_task_arithmetic_is_alpha_times_the_sum_of_the_truncated(kind):
    deltas = samples.task_deltas(kind)
    found = merge_one("star+task_arithmetic", deltas).delta
    truncated = [star.truncated_by_eta(samples.exact(delta), 40) for delta in deltas]
    assert_close(found, linear.task_arithmetic(truncated, 0.4), deltas)


def test_transforms_see_what_the_ones_before_them_left():
    deltas = [samples.dense(20, 30, seed=seed) for seed in range(2)]
    found = merge_one(make_pipeline("dare+trim", {"p": 0.9, "k": 50}), deltas).delta
    dropped = merge_one(make_pipeline("dare", {"p": 0.9}), deltas).delta
    # Half of the entries is more than dare leaves, so trim leaves all of those.
    np.testing.assert_array_equal(samples.values(found), samples.values(dropped))


def test_post_steps_come_in_their_order():
    deltas = samples.task_deltas("dense")
    averaged = merge_one("average", deltas).delta
    scaled = merge_one(make_pipeline("average+scale", {"factor": -2}), deltas).delta
    np.testing.assert_array_equal(samples.values(scaled), -2 * samples.values(averaged))
    calibrated = merge_one(make_pipeline("average+own_response+scale", {"factor": 3}), deltas)
    alone = merge_one("average+own_response", deltas).delta
    np.testing.assert_allclose(
        samples.values(calibrated.delta), 3 * samples.values(alone), rtol=1e-6
    )


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("weights", [(1, 2, 3, 4), (0.5, 0, -1, 2.5)])
def test_weights_weigh_the_average_and_the_sum(kind, weights):
    deltas = samples.task_deltas(kind)
    weighted = [w * samples.exact(delta) for w, delta in zip(weights, deltas, strict=True)]
    averaged = merge_one(Average(), deltas, weights=weights).delta
    assert_close(averaged, sum(weighted) / sum(weights), deltas)
    summed = merge_one(TaskArithmetic(), deltas, weights=weights).delta
    assert_close(summed, 0.4 * sum(weighted), deltas)
    truncated = merge_one(Star(), deltas, weights=weights).delta
    expected = [
        w * star.truncated_by_eta(samples.exact(delta), 40)
        for w, delta in zip(weights, deltas, strict=True)
    ]
    assert_close(truncated, sum(expected) / sum(weights), deltas)


def test_the_weight_of_a_model_that_leaves_the_tensor_alone_counts():
    deltas = samples.task_deltas("dense")[:2]
    found = merge_one(Average(), deltas, tasks=3, weights=(1, 2, 5)).delta
    expected = (samples.exact(deltas[0]) + 2 * samples.exact(deltas[1])) / 8
    assert_close(found, expected, deltas)


def test_weights_that_sum_to_zero_are_refused_where_they_divide():
    deltas = samples.task_deltas("dense")[:2]
    for weights in ((1, -1), (1, -1 + 1e-10)):
        with pytest.raises(UsageError, match="weights sum to zero, and average divides"):
            merge_one(Average(), deltas, weights=weights)
    with pytest.raises(UsageError, match="weights sum to zero, and average divides"):
        merge_one(Average(), samples.task_deltas("dense")[:3], weights=(0.1, 0.2, -0.3))
    merge_one(Average(), deltas, weights=(1, -1 + 1e-8))
    found = merge_one(TaskArithmetic(alpha=1), deltas, weights=(1, -1)).delta
    assert_close(found, samples.exact(deltas[0]) - samples.exact(deltas[1]), deltas)


def test_merge_state_takes_weights():
    deltas = samples.task_deltas("dense")[:2]
    states = [{"x": delta} for delta in deltas]
    found = merge_state(states, "task_arithmetic", weights=[2, 3])["x"]
    assert_close(found, 0.4 * (2 * samples.exact(deltas[0]) + 3 * samples.exact(deltas[1])), deltas)
    with pytest.raises(UsageError, match="3 weights for 2 models"):
        merge_state(states, weights=[1, 2, 3])


@pytest.mark.parametrize("step", [Scale(), Svc(), OwnResponse()])
@pytest.mark.parametrize(
    "merge", [Slerp(), Karcher(), Linear(normalize=False), NuSlerp(of="weights"), Mergekit()]
)
def test_no_post_step_follows_a_merge_of_weights(merge, step):
    with pytest.raises(UsageError, match=f"{merge.name} works on the weights.*Leave {step.name}"):
        Pipeline.of([merge, step])


@pytest.mark.parametrize("merge", [Linear(base_weight=2.0), NuSlerp(), Average()])
def test_post_steps_follow_merges_of_task_vectors(merge):
    steps = (Svc(), OwnResponse(), Scale())
    assert Pipeline.of([merge, *steps]).post_steps == steps


@pytest.mark.parametrize(
    "name", ["iso_c+scale+own_response", "scale+svc+own_response", "scale+own_response+svc"]
)
def test_scale_before_own_response_is_refused(name):
    with pytest.raises(UsageError, match=r"own_response: .* scale before it .*Leave scale out"):
        make_pipeline(name)
    make_pipeline("own_response+scale")


@pytest.mark.parametrize("merge", ["iso_c", "iso_cts", "tsv_m", "ace"])
@pytest.mark.parametrize("shared", ["A", "B"])
def test_star_leaves_factors_shared_that_were_shared(merge, shared):
    deltas = []
    for seed in range(4):
        delta = samples.low_rank(40, 30, 4, seed=seed, dtype=torch.bfloat16)
        first = samples.low_rank(40, 30, 4, seed=0, dtype=torch.bfloat16)
        B, A = (first.B, delta.A) if shared == "B" else (delta.B, first.A)
        deltas.append(LowRank(B, A, 0.5))
    alone = merge_one(merge, deltas).delta
    chain = make_pipeline(f"star+{merge}", {"eta": 100, "rescale": False})
    after = merge_one(chain, deltas).delta
    difference = oracle.frobenius(samples.values(after) - samples.values(alone))
    assert difference <= 1e-6 * oracle.frobenius(samples.values(alone))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Star], "Star is a class: write Star()"),
        (["star"], "'star' is none"),
        ([Star(), Average], "Average is a class"),
    ],
)
def test_what_is_no_method_is_refused(steps, message):
    with pytest.raises(UsageError) as error:
        Pipeline.of(steps)
    assert message in str(error.value)
    with pytest.raises(UsageError, match="is a class"):
        merge_state([{"x": samples.dense(3, 4)}], Star)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    with pytest.raises(UsageError, match="finite"):
        merge_state([{"x": samples.dense(3, 4)}] * 2, weights=[1, value])


def test_a_truth_value_is_no_number():
    with pytest.raises(UsageError, match="eta: True is no number"):
        make_pipeline("star", {"eta": True})
    assert make_pipeline("star", {"rescale": False}) == Pipeline.of([Star(rescale=False)])


_SURVEYS = [
    *[name for name in METHODS if name not in ("auto", "mergekit")],
    *["trim:scope=local", "ties:scope=local", "ties:zero_sign=zero", "knots:scope=local"],
    *["lines:alpha=0.5", "trim+ties+lines"],
]


@pytest.mark.parametrize("chain", _SURVEYS)
def test_a_chain_says_how_often_it_goes_through_the_model(chain: str) -> None:
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(6, 5, generator=generator) for _ in range(2)]
    tensor = TensorContext("w", (6, 5), False, tasks=("a", "b"), weights=(1.0, 1.0))
    passes = 0

    def walk(look: Callable[[Deltas, TensorContext], Any]) -> Iterator[Any]:
        nonlocal passes
        passes += 1
        yield look(Deltas.of(dict(enumerate(map(Dense, own)))), tensor)

    pipeline = as_pipeline(chain)
    pipeline.prepare(walk)
    assert passes == pipeline.passes
