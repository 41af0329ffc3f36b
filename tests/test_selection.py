"""The k-th largest magnitude against a sort."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge_models import selection
from starmerge_models.selection import (
    BUCKETS,
    SAMPLE,
    Tally,
    bracket,
    histogram,
    kth_largest,
    share_of,
)
from tests.oracles import samples

LARGEST = float(np.finfo(np.float32).max)
SUBNORMAL = 2.0**-149
KINDS = ["random", "tied", "alike", "subnormal", "huge", "zero-heavy", "of every size"]


@pytest.fixture(params=[0, selection._FEW], ids=["many", "few"], scope="module", autouse=True)
def _few(request):
    """Few numbers are selected from as they are, and here as if they were many, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_FEW", request.param)
        yield


def sorted_magnitudes(values):
    return np.sort(np.abs(values))[::-1]


def in_parts(values, cuts):
    return [torch.from_numpy(part) for part in np.split(values, sorted(cuts))]


def kth(values, k, cuts=(), sample=None):
    """The k-th largest of numbers that come in parts, where the sample is every 17th or given."""

    def parts(step):
        if step == 1:
            return in_parts(values, cuts)
        return [torch.from_numpy(values[::step] if sample is None else sample)]

    return kth_largest(parts, len(values), k)


def bits(value):
    return int(np.float32(value).view(np.int32))


def drawn(kind, count, seed=0):
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal(count)
    values = {
        "random": normal,
        "tied": np.round(2 * normal),
        "alike": 1.0 + normal * 2.0**-20,
        "subnormal": SUBNORMAL * generator.integers(-(2**20), 2**20, count),
        "huge": LARGEST * generator.uniform(-1, 1, count),
        "zero-heavy": np.where(generator.uniform(size=count) < 0.9, 0.0, normal),
        "of every size": normal * 2.0 ** generator.integers(-140, 120, count),
    }[kind]
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_is_that_of_the_sort(kind):
    values = drawn(kind, 70)
    found = [kth(values, k, [9, 9, 40]) for k in range(1, 71)]
    np.testing.assert_array_equal(found, sorted_magnitudes(values))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_many_numbers(kind):
    values = drawn(kind, 40_000, seed=1)
    ranks = [1, 2, 30, 1000, 8000, 20_000, 39_000, 39_999, 40_000]
    found = [kth(values, k, [1000, 17_000]) for k in ranks]
    np.testing.assert_array_equal(found, sorted_magnitudes(values)[np.array(ranks) - 1])


finite = st.floats(-LARGEST, LARGEST, width=32)
by_bits = st.integers(0, 0x7F7FFFFF).map(lambda bits: np.uint32(bits).view(np.float32).item())
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2.0**-23, SUBNORMAL, LARGEST, -LARGEST])
lists = st.lists(finite, min_size=1) | st.lists(by_bits, min_size=1) | st.lists(few, min_size=1)


@samples.SEARCH
@given(lists, st.data())
def test_any_numbers_in_any_parts_whatever_the_sample_says(numbers, data):
    values = np.array(numbers, dtype=np.float32)
    k = data.draw(st.integers(1, len(values)))
    cuts = data.draw(st.lists(st.integers(0, len(values)), max_size=5))
    sample = data.draw(st.none() | lists | st.just([]))
    sample = None if sample is None else np.array(sample, dtype=np.float32)
    assert kth(values, k, cuts, sample) == sorted_magnitudes(values)[k - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_sample_is_enough(kind):
    """All numbers are gone through once."""
    values, steps = drawn(kind, 40_000, seed=2), []

    def parts(step):
        steps.append(step)
        return [torch.from_numpy(values[::step])]

    found = [kth_largest(parts, len(values), k) for k in (400, 8000, 20_000)]
    np.testing.assert_array_equal(found, sorted_magnitudes(values)[[399, 7999, 19_999]])
    assert steps == 3 * [SAMPLE, 1]


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (24, 1)])
def test_the_shape_of_the_parts_and_their_strides_mean_nothing(shape):
    values = drawn("random", 24)
    part = torch.from_numpy(values).reshape(shape)
    wide = torch.zeros(*shape, 2)
    wide[..., 1] = part
    for same in (part, part.transpose(0, 1), wide[..., 1]):
        found = [kth_largest(lambda step, same=same: [same], 24, k) for k in range(1, 25)]
        np.testing.assert_array_equal(found, sorted_magnitudes(values))


def test_a_scalar_is_a_part():
    parts = [torch.tensor(-2.5), torch.tensor(1.0)]
    assert kth_largest(lambda step: parts, 2, 1) == 2.5


def test_numbers_that_are_missing_count_as_zeros():
    values = np.array([3.0, -SUBNORMAL], dtype=np.float32)
    assert [kth(values, k) for k in range(1, 5)] == [3.0, SUBNORMAL, 0.0, 0.0]


def test_the_share_of_no_numbers_is_0():
    assert kth_largest(lambda step: [], 0, share_of(0, 20.0)) == 0.0
    assert kth_largest(lambda step: [torch.zeros(0, 4)], 0, 1) == 0.0


def test_the_parts_are_left_alone():
    values = torch.tensor([[-3.0, 2.0], [-1.0, 0.0]])
    kth_largest(lambda step: [values], 4, 2)
    np.testing.assert_array_equal(values.numpy(), [[-3.0, 2.0], [-1.0, 0.0]])


def test_histograms_of_parts_add_up():
    values = drawn("of every size", 500)
    whole = histogram([torch.from_numpy(values)], 500)
    parts = in_parts(values, [3, 100, 444])
    np.testing.assert_array_equal(sum(histogram([part], len(part)) for part in parts), whole)
    np.testing.assert_array_equal(histogram(parts, 500), whole)
    assert whole.shape == (BUCKETS,)
    assert whole.sum() == 500


def test_a_sample_stands_for_all():
    values = torch.tensor([1.0, -1.0, 2.0, 2.0])
    counts = histogram([values], 10)
    assert counts[bits(1.0) >> 17] == counts[bits(2.0) >> 17] == 5


def test_the_buckets_reach_from_zero_to_infinity():
    counts = histogram([torch.tensor([0.0, -0.0, SUBNORMAL, -LARGEST, float("inf")])], 5)
    assert counts[0] == 3
    assert counts[-2] == counts[-1] == 1


@samples.SEARCH
@given(lists, st.data())
def test_all_numbers_tell_the_bucket(numbers, data):
    values = np.array(numbers, dtype=np.float32)
    k = data.draw(st.integers(1, len(values)))
    between = bracket(histogram([torch.from_numpy(values)], len(values)), k)
    assert len(between) == 2**17
    assert bits(sorted_magnitudes(values)[k - 1]) in between


def test_counts_beyond_a_float32_are_exact():
    counts = np.zeros(BUCKETS)
    counts[9], counts[4], counts[2] = 2**50 + 1, 1, 2**50

    def bucket(k):
        between = bracket(counts, k)
        assert len(between) == 2**17
        return between.start >> 17

    assert bucket(2**50 + 1) == 9
    assert bucket(2**50 + 2) == 4
    assert bucket(2**50 + 3) == bucket(2**51 + 2) == 2
    # Those that are missing are zeros.
    assert bucket(2**51 + 3) == 0


def test_the_last_bucket_is_one_like_the_others():
    counts = np.zeros(BUCKETS)
    counts[-1], counts[-2] = 2, 1
    found = [bracket(counts, k).stop >> 17 for k in (1, 2, 3)]
    assert found == [BUCKETS, BUCKETS, BUCKETS - 1]


def test_what_a_sample_may_have_missed_is_searched():
    """Two numbers of which one is nearly a fifth of all: either may be the one, both are in."""
    counts = np.zeros(BUCKETS)
    counts[bits(3.0) >> 17], counts[bits(1.0) >> 17] = 19_990, 80_010
    between = bracket(counts, 20_000, SAMPLE)
    assert bits(3.0) in between
    assert bits(1.0) in between
    # A bucket to either side.
    far = bracket(counts, 50_000, SAMPLE)
    assert far == range((bits(1.0) >> 17) - 1 << 17, (bits(1.0) >> 17) + 2 << 17)


@pytest.mark.parametrize("kept", [0, 3, 20])
@pytest.mark.parametrize("between", [range(bits(0.5), bits(1.5)), range(0, bits(0.1))])
@pytest.mark.parametrize("kind", KINDS)
def test_tallies_of_parts_are_that_of_the_whole(kind, between, kept, monkeypatch):
    monkeypatch.setattr(selection, "_MOST_ADDED", kept)
    values = drawn(kind, 150)
    whole, merged = Tally(between), Tally(between)
    whole.add(torch.from_numpy(values))
    for few_parts in (in_parts(values[:75], [5, 40, 41]), in_parts(values[75:], [60])):
        own = Tally(between)
        for part in few_parts:
            own.add(part)
        merged.merge(own)
    expected = [
        float(value) if bits(value) in between else None for value in sorted_magnitudes(values)
    ]
    assert [whole.kth_largest(k) for k in range(1, 151)] == expected
    assert [merged.kth_largest(k) for k in range(1, 151)] == expected


def test_what_is_not_between_the_bits_is_not_known():
    tally = Tally(range(bits(2.0), bits(3.0)))
    tally.add(torch.tensor([1.0, -2.0, 2.5, -3.0, 0.0]))
    assert [tally.kth_largest(k) for k in range(1, 7)] == [None, 2.5, 2.0, None, None, None]


@pytest.mark.parametrize(
    ("count", "percent", "share"),
    [
        # In binary, 0.07 * 10000 / 100 is 7.000000000000001.
        (10000, 0.07, 7),
        (1000, 0.6, 6),
        (1000, 0.61, 7),
        (5, 20.0, 1),
        (6, 20.0, 2),
        (7, 100.0, 7),
        (10**18 + 1, 100.0, 10**18 + 1),
        (3, 1e-300, 1),
        (0, 20.0, 0),
    ],
)
def test_a_share_is_rounded_up_from_the_percentage_as_written(count, percent, share):
    assert share_of(count, percent) == share


@samples.SEARCH
@given(st.integers(0, 2**40), st.integers(1, 10**6))
def test_any_share(count, parts):
    """Of percentages of four decimals, in integers."""
    assert share_of(count, float(f"{parts / 10**4:.4f}")) == -(-count * parts // 10**6)
