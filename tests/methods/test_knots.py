"""KnOTS against its float64 reference."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.merging.in_memory import merge_state
from starmerge_models.methods import Knots, make_method
from tests.merge_one import merge_one
from tests.oracles import bounds, knots, samples, spectral
from tests.products import one_in

WEIGHTS = [1.0, 0.5, -2.0, 4.0]
"""Powers of two: float32 holds the weighted deltas."""


def matrices(deltas):
    return [samples.exact(delta) for delta in deltas]


def rounding(found, deltas):
    """Frobenius error of X Y, factors U S and V̄, for thresholds and signs that are the exact ones.

    |dX| <= u |X|; an entry of Y is rounded as a coordinate, of one V_t or of Σ V_t, and once more
    as it is stored: |dY| <= 2 u |Y|. A mean of rounded coordinates moves by no more than they do
    where they agree in sign, as they do here. The float64 part is that of every spectral merge.
    """
    X, Y = found.B.double().numpy(), found.A.double().numpy()
    stored = np.linalg.norm(X) * np.linalg.norm(Y, 2) + 2 * np.linalg.norm(X, 2) * np.linalg.norm(Y)
    m, n = found.shape
    size = sum(np.linalg.norm(matrix) for matrix in matrices(deltas))
    return 1.01 * bounds.U32 * stored + 8 * (m + n) * bounds.U64 * 1e4 * size


def assert_is(found, expected, deltas):
    error = np.linalg.norm(samples.exact(found) - expected)
    assert error <= rounding(found, deltas)


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "k", "on"),
    one_in(3, spectral.SHAPES, samples.KINDS, samples.DTYPES, [20.0, 60.0, 100.0], ["v", "sv"]),
)
def test_knots_is_the_reference(shape, kind, dtype, k, on):
    m, n = shape
    deltas = samples.task_deltas(kind, m, n, dtype=dtype)
    found = spectral.merge(Knots(k=k, on=on, lambda_=0.6, scope="local"), deltas)
    assert_is(found, knots.knots(matrices(deltas), k, 0.6, on), deltas)
    # One tensor is the whole model.
    whole = spectral.merged(Knots(k=k, on=on, lambda_=0.6), deltas)
    np.testing.assert_array_equal(whole, samples.exact(found))


@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 0.0, 2.0, 0.5]])
@pytest.mark.parametrize("on", ["v", "sv"])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_weights_multiply_and_the_mean_divides_by_them(kind, on, weights):
    deltas = samples.task_deltas(kind, 30, 20)
    found = spectral.merge(Knots(on=on, k=50), deltas, weights)
    expected = knots.knots(matrices(deltas), 50, 1.0, on, weights)
    assert_is(found, expected, [delta.scaled(4.0) for delta in deltas])


def model(kind, dtype=torch.float32):
    """Three tensors, of scales that make a global threshold another than the local ones."""
    return {
        "first": samples.task_deltas(kind, 30, 20, dtype=dtype),
        "second": [delta.scaled(0.125) for delta in samples.task_deltas(kind, 12, 40, seed=100)],
        "third": [delta.scaled(8.0) for delta in samples.task_deltas(kind, 40, 12, seed=200)],
    }


def models(tensors):
    count = len(next(iter(tensors.values())))
    return [
        {name: deltas[t] for name, deltas in tensors.items() if deltas[t] is not None}
        for t in range(count)
    ]


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("on", ["v", "sv"])
@pytest.mark.parametrize("k", [20.0, 60.0])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_a_global_trim_goes_over_all_tensors(kind, k, on, scope):
    tensors = model(kind)
    found = merge_state(models(tensors), Knots(k=k, on=on, scope=scope))
    expected = knots.knots_of_model(list(map(matrices, tensors.values())), k, on=on, trim=scope)
    for (name, deltas), matrix in zip(tensors.items(), expected, strict=True):
        assert_is(found[name], matrix, deltas)


@pytest.mark.parametrize("on", ["v", "sv"])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_the_global_trim_is_another_than_the_local_one(kind, on):
    tensors = model(kind)
    scopes = [merge_state(models(tensors), Knots(on=on, scope=s)) for s in ("global", "local")]
    assert any(
        np.linalg.norm(samples.exact(scopes[0][name]) - samples.exact(scopes[1][name])) > 1e-2
        for name in tensors
    )


@pytest.mark.parametrize("on", ["v", "sv"])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_coordinates_of_tensors_that_a_task_leaves_alone_count_as_zeros(kind, on):
    tensors = model(kind)
    tensors["first"][1] = tensors["third"][1] = tensors["second"][3] = None
    found = merge_state(models(tensors), Knots(k=30, on=on))
    exact = [
        [np.zeros(deltas[0].shape) if delta is None else samples.exact(delta) for delta in deltas]
        for deltas in tensors.values()
    ]
    expected = knots.knots_of_model(exact, 30, on=on)
    for (name, deltas), matrix in zip(tensors.items(), expected, strict=True):
        assert_is(found[name], matrix, [delta for delta in deltas if delta is not None])


def test_vectors_take_no_part_in_the_trim():
    tensors = model("dense")
    with_vectors = tensors | {"bias": [samples.dense(50, seed=t).scaled(100.0) for t in range(4)]}
    expected = merge_state(models(tensors), Knots())
    found = merge_state(models(with_vectors), Knots())
    for name, delta in expected.items():
        np.testing.assert_array_equal(samples.exact(found[name]), samples.exact(delta))
    mean = sum(matrices(with_vectors["bias"])) / 4
    np.testing.assert_allclose(samples.exact(found["bias"]), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("on", ["v", "sv"])
def test_all_of_one_task_is_itself(kind, on):
    for delta in samples.task_deltas(kind, 30, 20):
        found = spectral.merge(Knots(k=100, lambda_=0.5, on=on), [delta])
        assert_is(found, 0.5 * samples.exact(delta), [delta])


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_all_of_equal_tasks_is_that_task(kind):
    delta = samples.task_deltas(kind, 30, 20)[2]
    found = spectral.merge(Knots(k=100), [delta] * 3)
    assert_is(found, samples.exact(delta), [delta] * 3)


@pytest.mark.parametrize("on", ["v", "sv"])
@pytest.mark.parametrize("stored", ["factors", "matrices"])
def test_orthogonal_tasks_are_added(on, stored):
    deltas = spectral.orthogonal_tasks()
    deltas = deltas if stored == "factors" else spectral.as_dense(deltas)
    found = spectral.merge(Knots(k=100, on=on), deltas)
    assert_is(found, sum(matrices(deltas)), deltas)


@pytest.mark.parametrize("kind", samples.KINDS)
def test_all_of_both_is_the_same_on_v_and_on_sv(kind):
    deltas = samples.task_deltas(kind, 30, 20)
    v, sv = (spectral.merge(Knots(k=100, on=on), deltas) for on in ("v", "sv"))
    error = np.linalg.norm(samples.exact(v) - samples.exact(sv))
    assert error <= rounding(v, deltas) + rounding(sv, deltas)


def test_the_result_has_the_rank_of_all_tasks_together():
    assert spectral.merge(Knots(), samples.task_deltas("low-rank", 30, 20)).rank == 16
    assert spectral.merge(Knots(), samples.task_deltas("low-rank", 9, 7)).rank == 9
    assert spectral.merge(Knots(), spectral.parallel_columns()).rank == 3
    turned = list(map(samples.transposed, spectral.shared_A()))
    assert spectral.merge(Knots(), turned).rank == 3


@pytest.mark.parametrize("k", [20, 100])
def test_columns_that_one_task_leaves_alone_are_the_others(k):
    # Columns of zeros have zeros as coordinates, no rounding that would vote.
    first, second = samples.normal(9, 7, seed=1), samples.normal(9, 7, seed=2)
    second[:, :3] = 0.0
    found = spectral.merge(Knots(k=k), [Dense(first), Dense(second)])
    assert_is(
        found, knots.knots([first.double().numpy(), second.double().numpy()], k), [Dense(first)]
    )


@pytest.mark.parametrize("on", ["v", "sv"])
def test_entries_that_cancel_exactly_give_zero(on):
    # The sign of a row of V is the SVD's choice: a majority of signs would be none of the deltas.
    matrix = samples.normal(9, 7, seed=1)
    assert not spectral.merged(Knots(k=100, on=on), [Dense(matrix), Dense(-matrix)]).any()


def test_a_task_of_zeros_does_not_vote():
    delta = samples.low_rank(30, 20, 4)
    fresh = LowRank(torch.zeros(30, 4), samples.normal(4, 20, seed=8))
    found = spectral.merge(Knots(k=100), [delta, fresh, fresh])
    assert_is(found, samples.exact(delta), [delta])


def test_it_trims_as_the_defining_repository_does():
    deltas = samples.task_deltas("low-rank", 30, 20)
    found = spectral.merge(make_method("knots"), deltas)
    assert_is(found, knots.knots(matrices(deltas), on="sv"), deltas)
    assert (
        spectral.merged("knots", deltas).tolist() != spectral.merged(Knots(on="v"), deltas).tolist()
    )


@pytest.mark.parametrize("parameters", [{"k": 0}, {"k": 101}, {"on": "u"}, {"scope": "layer"}])
def test_parameters_out_of_range_are_refused(parameters):
    with pytest.raises(UsageError, match=next(iter(parameters))):
        make_method("knots", parameters)


@pytest.mark.parametrize("on", ["v", "sv"])
@pytest.mark.parametrize("k", [100.0, 50.0, 30.0])
def test_rounding_of_matrices_does_not_vote(k, on):
    factored = spectral.orthogonal_tasks(tasks=4)
    whole = spectral.as_dense(factored, torch.float32)
    expected, found = (spectral.merged(Knots(k=k, on=on), given) for given in (factored, whole))
    # By Weyl σ moves by no more than ‖E‖, by Wedin u and v by √2 ‖E‖ / gap each; the gap is 1.
    sigma = np.arange(1, 9)
    moved = bounds.U32 * np.linalg.norm(sigma) * np.sum(1 + 2 * np.sqrt(2) * sigma)
    stored = rounding(spectral.merge(Knots(k=k, on=on), whole), whole)
    assert np.linalg.norm(found - expected) <= moved + stored


class Decomposed(TorchFunctionMode):
    """Notes the shapes of the matrices that SVDs are taken of."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.linalg.svd:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("deltas", "shape"),
    [
        (samples.task_deltas("dense", 12, 40), (12, 12)),
        (samples.task_deltas("low-rank", 30, 20), (16, 16)),
        (samples.task_deltas("dense", 40, 9), (36, 36)),
        ([samples.low_rank(40, 9, 40)], (40, 9)),
    ],
)
def test_no_svd_is_as_long_as_all_tasks_side_by_side(deltas, shape):
    with Decomposed() as decomposed:
        merge_one(Knots(scope="local"), deltas)
    assert decomposed.shapes == [shape]
