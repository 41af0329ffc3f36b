"""Merging deltas in memory, tensor by tensor."""

import numpy as np
import pytest
import torch

import starmerge_models
from starmerge_models import Average, Dense, LowRank, Star, TaskArithmetic, merge_state
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.fold import fold
from tests.oracles import bounds, linear, samples, star
from tests.oracles import deltas as oracle

METHODS = {
    "average": (Average(), linear.average),
    "task_arithmetic": (TaskArithmetic(alpha=0.3), lambda d: linear.task_arithmetic(d, 0.3)),
    "star": (Star(eta=40), lambda d: star.star(d, eta=40)),
    "star by rank": (Star(rank=2), lambda d: star.star(d, rank=2)),
}


def assert_close(found, expected, deltas):
    """Within float32 rounding of the deltas' sizes, over all products that are summed."""
    products = sum(min(*delta.shape, delta.rank) for delta in deltas) + 20
    sizes = sum(oracle.nuclear(bounds.magnitude(delta)) for delta in deltas)
    difference = oracle.frobenius(samples.values(found) - expected)
    assert difference <= bounds.gamma(products, bounds.U32) * sizes


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_kind_and_dtype(method, kind, dtype):
    first = samples.task_deltas(kind, dtype=dtype)
    second = samples.task_deltas(kind, 5, 12, dtype=dtype, seed=100)
    states = [{"first": a, "second": b} for a, b in zip(first, second, strict=True)]
    merge, reference = METHODS[method]
    merged = merge_state(states, merge)
    assert list(merged) == ["first", "second"]
    for name, deltas in (("first", first), ("second", second)):
        expected = reference([samples.exact(delta) for delta in deltas])
        assert_close(merged[name], expected, deltas)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_some_models_leave_alone(method):
    a, b, c = samples.task_deltas("mixed")[:3]
    zero = np.zeros(a.shape)
    states = [{"x": a}, {"y": b, "x": c}, {}]
    merge, reference = METHODS[method]
    merged = merge_state(states, merge)
    assert list(merged) == ["x", "y"]
    expected = reference([samples.exact(a), samples.exact(c), zero])
    assert_close(merged["x"], expected, [a, c])
    assert_close(merged["y"], reference([zero, samples.exact(b), zero]), [b])


def test_one_model_averaged_is_that_model():
    delta = samples.low_rank(6, 5, 2)
    merged = merge_state([{"x": delta}], Average())
    np.testing.assert_array_equal(samples.values(merged["x"]), samples.values(delta))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("states", [[], [{}], [{}, {}]])
def test_nothing_to_merge(states, method):
    assert merge_state(states, METHODS[method][0]) == {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(), (5,), (6, 3, 2, 2), (0, 5), (3, 0), (1, 7), (7, 1)])
def test_full_finetunes_of_every_shape(shape, method):
    deltas = [samples.dense(*shape, seed=seed) for seed in range(3)]
    merge, reference = METHODS[method]
    merged = merge_state([{"x": delta} for delta in deltas], merge)["x"]
    assert merged.shape == deltas[0].shape
    assert torch.isfinite(merged.to_dense()).all()
    if deltas[0].tensor.numel():
        assert_close(merged, reference([samples.exact(delta) for delta in deltas]), deltas)
    base = samples.normal(*shape, seed=9, dtype=torch.bfloat16)
    assert fold(base, merged, torch.bfloat16).weight.shape == shape


@pytest.mark.parametrize("method", METHODS)
def test_zero_deltas_stay_zero(method):
    zeros = [LowRank(torch.zeros(4, 2), torch.ones(2, 3)), Dense(torch.zeros(4, 3))]
    merged = merge_state([{"x": zero} for zero in zeros], METHODS[method][0])
    assert not merged["x"].to_dense().any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "deltas",
    [
        (samples.dense(4, 5), samples.dense(5, 4)),
        (samples.low_rank(4, 5, 2), samples.low_rank(5, 4, 2)),
        (samples.dense(4, 5), samples.low_rank(4, 6, 2)),
    ],
)
def test_models_that_disagree_on_a_shape_are_refused(deltas, method):
    with pytest.raises(UsageError, match="shapes"):
        merge_state([{"x": delta} for delta in deltas], METHODS[method][0])


def test_vectors_are_averaged_by_star():
    deltas = [samples.dense(5, seed=seed) for seed in range(3)]
    by_star = merge_state([{"x": delta} for delta in deltas], Star(rank=1))["x"]
    averaged = merge_state([{"x": delta} for delta in deltas], Average())["x"]
    np.testing.assert_array_equal(samples.values(by_star), samples.values(averaged))


def test_the_inputs_are_left_alone():
    for merge, _ in METHODS.values():
        states = [{"x": delta} for delta in samples.task_deltas("mixed")]
        before = [samples.exact(state["x"]).copy() for state in states]
        merge_state(states, merge)
        for state, values in zip(states, before, strict=True):
            assert list(state) == ["x"]
            np.testing.assert_array_equal(samples.exact(state["x"]), values)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_a_merged_delta_folds_into_the_base(kind):
    deltas = samples.task_deltas(kind, 300, 7)
    base = samples.normal(300, 7, seed=1)
    merged = merge_state([{"x": delta} for delta in deltas], Star())["x"]
    expected = star.star([samples.exact(delta) for delta in deltas], eta=40)
    assert_close(merged, expected, deltas)
    weight = oracle.exact(fold(base, merged, torch.float32).weight)
    exact = oracle.exact(base) + samples.exact(merged)
    error = bounds.weighted_sum([merged]) + bounds.U32 * np.abs(exact)
    assert np.all(np.abs(weight - exact) <= 1.001 * error)


@pytest.mark.parametrize("method", ["star", "ties", "tsv_m", "dare"])
def test_threads_change_nothing(method):
    first, second = (samples.task_deltas("mixed", *shape) for shape in ((300, 40), (9, 7)))
    states = [{"first": a, "second": b} for a, b in zip(first, second, strict=True)]
    alone, *others = (merge_state(states, method, threads=threads) for threads in (1, 2, 3))
    for other in others:
        for name in ("first", "second"):
            assert torch.equal(other[name].to_dense(), alone[name].to_dense())


_CHAINS = ["average", "star", "ties", "dare+average", "della+ties", "trim+average", "sce", "linear"]
_CHAINS += ["knots", "tsv_m", "ace", "covariance", "denoise+svc", "star+own_response"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("method", _CHAINS)
def test_torch_s_default_dtype_changes_nothing(method, kind, dtype, request):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    states = [{"x": delta} for delta in samples.task_deltas(kind, 30, 20)]
    states[0]["y"] = samples.low_rank(30, 20, 2, seed=7)
    base = samples.normal(30, 20, seed=90, dtype=torch.bfloat16)
    found = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        merged = merge_state(states, method)
        found.append({name: fold(base, delta, torch.float32) for name, delta in merged.items()})
    for name, expected in found[0].items():
        assert found[1][name].weight.dtype == torch.float32
        assert torch.equal(found[1][name].weight, expected.weight)
        assert found[1][name].survived == expected.survived


def test_the_public_names():
    assert starmerge_models.merge_state is merge_state
    assert sorted(starmerge_models.__all__) == dir(starmerge_models)
    for name in set(starmerge_models.__all__) - {"Delta"}:  # which is either of two classes
        assert getattr(starmerge_models, name).__name__ == name


@pytest.mark.parametrize("method", ["average", "ties", "star", "iso_c", "dare"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_whatever_the_method(value, method):
    broken = torch.ones(4, 5)
    broken[2, 3] = value
    cases = [Dense(broken), LowRank(torch.ones(4, 1), torch.full((1, 5), value))]
    cases.append(LowRank(torch.ones(4, 1), torch.ones(1, 5), value))
    for case in cases:
        with pytest.raises(
            StarmergeError, match="Model 1: the delta of x has a NaN or an infinity"
        ):
            merge_state([{"x": samples.dense(4, 5)}, {"x": case}], method)


def test_reports_and_results_show_themselves(tiny_base, make_adapter, tmp_path):
    models = [make_adapter("a", seed=1), make_adapter("<b>", seed=2)]
    result = starmerge_models.merge(tiny_base, models, "star", output=tmp_path / "out")
    assert repr(result).startswith(f"MergeResult in {tmp_path / 'out'}: MergeReport of star: 4 ")
    assert len(repr(result)) < 500
    assert "<b>star</b>: 4 tensors merged" in result._repr_html_()
    frame = result.report.to_frame()
    assert list(frame["model"]) == ["a", "<b>"] * 4
    assert frame["rank"].between(1, 4).all()
    plain = starmerge_models.merge(tiny_base, models, "average", output=tmp_path / "plain")
    assert len(plain.report.to_frame()) == 4
