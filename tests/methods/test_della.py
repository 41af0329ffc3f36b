"""DELLA's dropping against its float64 reference, and its randomness."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models import merge_state
from starmerge_models.deltas import Dense
from starmerge_models.errors import UsageError
from starmerge_models.methods import Della, make_method, make_pipeline
from starmerge_models.methods.kinds import entrywise
from starmerge_models.methods.kinds.masks import keep_probabilities, l1_factor, largest, masked
from tests.oracles import bounds, dare, della, models, samples, weights


def thinned(model, density, epsilon, rescale, seed=0, task="0"):
    """The reference's task vectors of one model in memory, by tensor."""
    made = {}
    for name, delta in model.items():
        x = delta.entries().double().numpy()
        whole = x.reshape(delta.tensor.shape) if isinstance(delta, Dense) else x
        p = della.chances(whole, density, epsilon)
        numbers = np.array(dare.numbers(seed, task, name, x.size))
        keep = (numbers >= (1 - np.ravel(p)) * 2**32).reshape(p.shape)
        if rescale == "l1":
            found = della.rescaled_l1(whole, keep)
        else:
            found = della.rescaled_by_chance(whole, keep, p)
        made[name] = found.reshape(x.shape)
    return made


@pytest.mark.parametrize("rescale", ["l1", "probability"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.0), (0.7, 0.25)])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_della_is_the_reference(kind, dtype, density, epsilon, rescale):
    (model, *_) = models.models(kind, dtype=dtype)
    parameters = {"density": density, "epsilon": epsilon, "rescale": rescale, "seed": 5, "alpha": 1}
    found = models.merge([model], "della+task_arithmetic", parameters)
    want = thinned(model, density, epsilon, rescale, seed=5)
    for name, values in want.items():
        np.testing.assert_array_equal(found[name] == 0, values == 0, err_msg=name)
        # One division in float64, sums of some hundred terms, one rounding to float32.
        np.testing.assert_allclose(found[name], values, rtol=weights.U32 + 1000 * bounds.U64)


def test_a_density_of_1_changes_nothing():
    given = models.models("mixed")
    chained = models.merge(given, "della+task_arithmetic", {"density": 1})
    for name, values in models.merge(given, "task_arithmetic").items():
        np.testing.assert_array_equal(chained[name], values)


def test_what_is_left_has_the_l1_norm_of_all():
    delta = samples.dense(40, 30)
    left = merge_state([{"w": delta}], make_pipeline("della"))["w"].to_dense()
    before = delta.tensor.abs().double().sum()
    assert float(left.abs().double().sum()) == pytest.approx(float(before), rel=1e-6)


@pytest.mark.parametrize("rescale", ["l1", "probability"])
def test_the_expected_task_vector_is_what_it_was(rescale):
    model = {f"w{i}": samples.dense(1, 25) for i in range(400)}
    parameters = {"density": 0.6, "epsilon": 0.2, "rescale": rescale}
    found = models.merge([model], "della+task_arithmetic", parameters | {"alpha": 1})
    mean, x = np.mean(list(found.values()), axis=0)[0], samples.exact(model["w0"])[0]
    p = della.chances(x, 0.6, 0.2)
    if rescale == "probability":
        # Each of 400 terms is within [0, |x| / p].
        assert np.all(
            np.abs(mean - x) <= dare.deviation([1] * 400, 1e-9 / 25) / 400 * np.abs(x) / p
        )
    else:
        # The factor is about Σ|x| / Σ p|x|: large entries gain, small ones lose.
        order = np.argsort(np.abs(x))
        assert np.abs(mean[order[-1]]) > np.abs(x[order[-1]])
        assert np.abs(mean[order[5]]) < np.abs(x[order[5]])


def test_entries_stay_as_often_as_their_rank_says():
    n = 4000
    rows = torch.arange(1.0, 11.0).repeat(n, 1)
    left = merge_state([{"w": Dense(rows)}], make_pipeline("della", {"density": 0.5}))["w"]
    share = (left.to_dense() != 0).double().mean(0).numpy()
    expected = 0.35 + 0.3 * np.arange(10) / 9
    assert np.all(np.abs(share - expected) <= dare.deviation([1] * n, 1e-9) / n)


def test_a_task_keeps_its_entries_whatever_it_is_merged_with():
    (first, second, *_) = models.models("dense")
    alone = models.merge([first], "della+task_arithmetic", {"alpha": 1})
    both = models.merge([first, second], "della+task_arithmetic", {"alpha": 1}, [1.0, 0.0])
    for name, values in alone.items():
        np.testing.assert_array_equal(both[name], values)


matrices = st.tuples(samples.lengths, samples.lengths, samples.seeds, samples.entries)


@samples.SEARCH
@given(matrices, st.floats(0.1, 0.9), st.floats(0, 0.1))
def test_chances_are_the_reference(drawn, density, epsilon):
    m, n, seed, entries = drawn
    x = entries(m, n, seed=seed)
    found = keep_probabilities(x, density, epsilon).numpy()
    np.testing.assert_allclose(found, della.chances(x.numpy(), density, epsilon), rtol=1e-14)


@samples.SEARCH
@given(matrices, st.data())
def test_the_largest_are_the_reference(drawn, data):
    m, n, seed, entries = drawn
    x = entries(m, n, seed=seed)
    k = data.draw(st.integers(0, m * n))
    kept = np.zeros(m * n, dtype=bool)
    kept[np.argsort(-np.abs(x.numpy().ravel()), kind="stable")[:k]] = True
    np.testing.assert_array_equal(largest(x, k).numpy().ravel(), kept)


def test_zeros_of_either_sign_have_the_same_rank():
    x = torch.tensor([[0.0, -0.0, 2.0**-149, -0.0, -(2.0**-149), 0.0]])
    found = keep_probabilities(x, 0.5, 0.25).numpy()
    np.testing.assert_allclose(found, [[0.25, 0.35, 0.65, 0.45, 0.75, 0.55]], rtol=1e-14)


@pytest.mark.parametrize("entries", [samples.normal, samples.integers])
@pytest.mark.parametrize("k", [1, 40, 9000, 29_999])
def test_the_largest_of_many_are_the_reference(k, entries):
    x = entries(300, 100, seed=4)
    kept = np.zeros(30_000, dtype=bool)
    kept[np.argsort(-np.abs(x.numpy().ravel()), kind="stable")[:k]] = True
    np.testing.assert_array_equal(largest(x, k).numpy().ravel(), kept)


def test_outside_of_a_mask_there_are_zeros_without_a_sign():
    x = torch.tensor([[-1.0, 2.0, -0.0], [-3.0, float("inf"), -0.0]])
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert masked(x, mask).numpy().tobytes() == np.float32([-1, 0, -0.0, 0, 0, 0]).tobytes()


@pytest.mark.parametrize("rescale", ["l1", "probability"])
@pytest.mark.parametrize("entries", [1, 7, 50])
def test_the_size_of_the_panels_means_nothing(entries, rescale, monkeypatch):
    # Sums of integers are exact, in whatever parts.
    given = models.models("dense", entries=samples.integers)
    at_once = models.merge(given, "della+ties", {"rescale": rescale})
    monkeypatch.setattr(entrywise, "PANEL_ENTRIES", entries)
    for name, values in models.merge(given, "della+ties", {"rescale": rescale}).items():
        np.testing.assert_array_equal(values, at_once[name])


def test_sums_too_small_to_divide_by_are_left_alone():
    x = torch.tensor([[1.0, 2.0]])
    assert l1_factor(x, torch.tensor([[True, False]])) == 3.0
    assert l1_factor(x, torch.tensor([[False, False]])) == 1.0
    assert l1_factor(x * 1e-9, torch.tensor([[True, False]])) == 1.0


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (3, 0), (3, 1)])
def test_scalars_short_rows_and_empty_tensors(shape):
    delta = Dense(torch.ones(shape))
    left = merge_state([{"w": delta}], make_pipeline("della"))["w"].to_dense()
    assert left.shape == delta.shape
    assert left.isfinite().all()


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.1, 0.15), (0.15, 0.15)])
def test_chances_that_are_none_are_refused(density, epsilon):
    chain = make_pipeline("della", {"density": density, "epsilon": epsilon})
    with pytest.raises(UsageError, match=f"della: with density {density} and epsilon {epsilon}"):
        merge_state([{"w": samples.dense(3, 4)}], chain)


@pytest.mark.parametrize(
    "wrong", [{"density": 0}, {"density": 1.1}, {"epsilon": -0.1}, {"seed": -1}]
)
def test_parameters_out_of_their_range_are_refused(wrong):
    with pytest.raises(UsageError, match=f"'della': {next(iter(wrong))}: "):
        make_method("della", wrong)
    assert Della().density == 0.5
