"""Trimming against its float64 reference, and the properties that define it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models import merge_state
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import Trim, make_pipeline
from starmerge_models.methods import trim as trimming
from tests.oracles import models, samples, trim
from tests.products import one_in


def trimmed(given, **parameters):
    """Each model as it is trimmed beside the others: their sum, with the others weighted 0."""
    return [
        models.merge(given, "trim+task_arithmetic", {"alpha": 1, **parameters}, weights)
        for weights in np.eye(len(given)).tolist()
    ]


def assert_is_trim(given, k, scope):
    expected = trim.trim(models.entries(given), k, scope)
    for got, want in zip(trimmed(given, k=k, scope=scope), expected, strict=True):
        models.assert_same(got, want)


def magnitudes_1_to(n, seed=0):
    """1 ... n in some order, with signs."""
    generator = np.random.default_rng(seed)
    return generator.permutation(np.arange(1.0, n + 1)) * generator.choice([-1, 1], n)


@pytest.mark.parametrize(
    ("kind", "dtype", "entries"),
    one_in(2, samples.KINDS, samples.DTYPES, [samples.normal, samples.integers]),
)
def test_trim_is_the_reference(kind, dtype, entries):
    given = models.models(kind, dtype=dtype, entries=entries)
    for k in (20, 0.7, 63.1):
        for scope in ("global", "local"):
            assert_is_trim(given, k, scope)


@samples.SEARCH
@given(
    models.many(max_tasks=3),
    st.sampled_from([0.01, 5.0, 20.0, 33.3, 50.0, 99.9, 100.0]),
    st.sampled_from(["global", "local"]),
)
def test_every_shape_dtype_and_share(given, k, scope):
    assert_is_trim(given, k, scope)


def test_by_default_the_20_percent_largest_of_the_whole_model_stay():
    assert Trim().parameters() == {"k": 20.0, "scope": "global"}
    given = models.models("mixed")
    expected = trim.trim(models.entries(given), 20, "global")
    for got, want in zip(trimmed(given), expected, strict=True):
        models.assert_same(got, want)


def test_an_entry_stays_if_it_is_as_large_as_the_last_that_counts():
    [got] = trimmed(models.from_entries({"x": [1, -2, 3, 2, 0.5]}), k=40)
    np.testing.assert_array_equal(got["x"].ravel(), [0, -2, 3, 2, 0])
    [got] = trimmed(models.from_entries({"x": [1, -2, 3, 2, 0.5]}), k=20)
    np.testing.assert_array_equal(got["x"].ravel(), [0, 0, 3, 0, 0])


def test_the_largest_of_the_whole_model_or_of_each_tensor():
    given = models.from_entries({"large": [[5, 6], [7, 8]], "small": [[1, 2, 3, 4]]})
    [got] = trimmed(given, k=50)
    np.testing.assert_array_equal(got["large"], [[5, 6], [7, 8]])
    np.testing.assert_array_equal(got["small"], [[0, 0, 0, 0]])
    [got] = trimmed(given, k=50, scope="local")
    np.testing.assert_array_equal(got["large"], [[0, 0], [7, 8]])
    np.testing.assert_array_equal(got["small"], [[0, 0, 3, 4]])


def test_each_task_has_a_threshold_of_its_own():
    first, second = trimmed(models.from_entries({"x": [1, 2]}, {"x": [40, 30]}), k=50)
    np.testing.assert_array_equal(first["x"].ravel(), [0, 2])
    np.testing.assert_array_equal(second["x"].ravel(), [40, 0])


def test_entries_that_a_task_leaves_alone_count():
    given = models.from_entries({"x": magnitudes_1_to(10)}, {"y": magnitudes_1_to(90)})
    first, second = trimmed(given, k=20)
    assert np.count_nonzero(first["x"]) == 10
    assert np.count_nonzero(second["y"]) == 20
    first, second = trimmed(given, k=20, scope="local")
    assert np.count_nonzero(first["x"]) == 2
    assert np.count_nonzero(second["y"]) == 18


@samples.SEARCH
@given(st.integers(1, 300), st.integers(1, 1000), samples.seeds)
def test_of_different_magnitudes_exactly_the_share_stays(n, tenths, seed):
    """The share rounded up, where the repository of TIES keeps one entry more."""
    [got] = trimmed(models.from_entries({"x": magnitudes_1_to(n, seed)}), k=tenths / 10)
    kept = -(-n * tenths // 1000)
    assert np.count_nonzero(got["x"]) == kept
    assert np.abs(got["x"][got["x"] != 0]).min() == n - kept + 1


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_k_100_keeps_every_entry(kind, scope):
    given = models.models(kind)
    for got, want in zip(trimmed(given, k=100, scope=scope), models.entries(given), strict=True):
        models.assert_same(got, want)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_if_few_entries_are_not_zero_they_all_stay(scope):
    x = np.zeros((5, 8))
    x[1, 3], x[4, 7] = 1e-30, -5
    [got] = trimmed(models.from_entries({"x": x}), k=50, scope=scope)
    np.testing.assert_array_equal(got["x"], x.astype(np.float32))


def misleading(seed):
    """A model of which every 17th row, which are looked at first, is of another size."""
    generator = np.random.default_rng(seed)
    tall = generator.standard_normal((1500, 3))
    tall[::17] *= 10.0 ** (-3) ** seed
    B, A = generator.standard_normal((1200, 2)), generator.standard_normal((2, 4))
    B[::17] *= 100
    return {
        "tall": Dense(torch.from_numpy(tall).float()),
        "adapter": LowRank(torch.from_numpy(B).bfloat16(), torch.from_numpy(A).bfloat16()),
        "small": samples.dense(9, 7, seed=seed),
    }


@pytest.mark.parametrize("k", [0.1, 5, 20, 93, 99.9])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_thresholds_are_exact_where_some_rows_mislead(scope, k):
    assert_is_trim([misleading(0), misleading(1)], k, scope)


@pytest.mark.parametrize("k", [0.1, 5, 20, 50, 93])
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("entries", [samples.normal, samples.integers])
def test_thresholds_of_tall_tensors(entries, scope, k):
    given = [
        {"tall": samples.dense(3000, 5, seed=t, entries=entries), "row": samples.dense(1, 2000)}
        for t in range(2)
    ]
    assert_is_trim(given, k, scope)


numbers = st.integers(0, 0x7F7FFFFF).map(lambda bits: np.uint32(bits).view(np.float32).item())


@samples.SEARCH
@given(st.lists(numbers, min_size=1, max_size=40), st.data())
def test_what_is_below_a_threshold_becomes_zero(magnitudes, data):
    threshold = data.draw(st.sampled_from([0.0, 2.0**-149, 2.0**-126, *magnitudes]))
    signs = data.draw(st.lists(st.sampled_from([1, -1]), min_size=40, max_size=40))
    x = np.array(magnitudes, dtype=np.float32) * np.array(signs[: len(magnitudes)], np.float32)
    left = trimming.trimmed(torch.from_numpy(x), threshold).numpy()
    expected = np.where(np.abs(x) >= threshold, x, np.float32(0))
    assert left.tobytes() == expected.tobytes()


def test_trimming_sees_what_stands_before_it_in_the_chain():
    given = models.models("mixed", entries=samples.integers)
    dropped = merge_state(given[:1], make_pipeline("dare+task_arithmetic", {"alpha": 1}))
    expected = trim.trim(models.entries([dropped]), 20)[0]
    merged = models.merge(given[:1], "dare+trim+task_arithmetic", {"alpha": 1})
    models.assert_same(merged, expected)


def test_weights_come_after_trimming():
    given = models.from_entries({"x": [1, 8, 3]}, {"x": [2, 0, 4]})
    merged = models.merge(given, "trim+task_arithmetic", {"k": 60, "alpha": 1}, [4, -1])
    np.testing.assert_array_equal(merged["x"].ravel(), [-2, 32, 8])


def test_trimmed_adapters_are_dense():
    given = models.models("low-rank")
    merged = merge_state(given, make_pipeline("trim+task_arithmetic"))
    assert all(isinstance(delta, Dense) for delta in merged.values())


def test_without_a_merge_the_average_is_taken():
    given = models.from_entries({"x": [1, 2, 3, 4]}, {"x": [8, 0, 0, 0]})
    merged = models.merge(given, "trim", {"k": 50})
    np.testing.assert_array_equal(merged["x"].ravel(), [4, 0, 1.5, 2])


def test_float64_deltas_are_trimmed_as_float32():
    one = 1 + 2.0**-40
    [got] = trimmed([{"x": Dense(torch.tensor([1.0, one, 0.5, 0.5], dtype=torch.float64))}], k=25)
    np.testing.assert_array_equal(got["x"].ravel(), [1, 1, 0, 0])


@pytest.mark.parametrize("k", [0, -1, 100.1, float("nan"), float("inf"), "all", None])
def test_k_is_a_percentage_above_0(k):
    with pytest.raises(UsageError, match=r"'trim': k: .*\(got "):
        make_pipeline("trim", {"k": k})


def test_the_scope_is_global_or_local():
    with pytest.raises(UsageError, match=r"'trim': scope: .*'global' or 'local'.*'layer'"):
        make_pipeline("trim", {"scope": "layer"})
