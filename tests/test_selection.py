"""The k-th largest magnitude against a sort."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starmerge.selection import (
    BUCKETS,
    histogram,
    kth_largest,
    locate,
    magnitude,
    share_of,
)
from tests.oracles import samples

LARGEST = float(np.finfo(np.float32).max)
SUBNORMAL = 2.0**-149


def sorted_magnitudes(values):
    return np.sort(np.abs(values))[::-1]


def in_parts(values, cuts):
    return [torch.from_numpy(part) for part in np.split(values, sorted(cuts))]


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


@pytest.mark.parametrize(
    "kind", ["random", "tied", "alike", "subnormal", "huge", "zero-heavy", "of every size"]
)
def test_every_rank_is_that_of_the_sort(kind):
    values = drawn(kind, 70)
    found = [kth_largest(lambda: in_parts(values, [9, 9, 40]), k) for k in range(1, 71)]
    np.testing.assert_array_equal(found, sorted_magnitudes(values))


finite = st.floats(-LARGEST, LARGEST, width=32)
by_bits = st.integers(0, 0x7F7FFFFF).map(lambda bits: np.uint32(bits).view(np.float32).item())
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2.0**-23, SUBNORMAL, LARGEST, -LARGEST])


@samples.SEARCH
@given(
    st.lists(finite, min_size=1) | st.lists(by_bits, min_size=1) | st.lists(few, min_size=1),
    st.data(),
)
def test_any_numbers_in_any_parts(numbers, data):
    values = np.array(numbers, dtype=np.float32)
    k = data.draw(st.integers(1, len(values)))
    cuts = data.draw(st.lists(st.integers(0, len(values)), max_size=5))
    assert kth_largest(lambda: in_parts(values, cuts), k) == sorted_magnitudes(values)[k - 1]


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (24, 1)])
def test_the_shape_of_the_parts_and_their_strides_mean_nothing(shape):
    values = drawn("random", 24)
    part = torch.from_numpy(values).reshape(shape)
    wide = torch.zeros(*shape, 2)
    wide[..., 1] = part
    for same in (part, part.transpose(0, 1), wide[..., 1]):
        found = [kth_largest(lambda same=same: [same], k) for k in range(1, 25)]
        np.testing.assert_array_equal(found, sorted_magnitudes(values))


def test_a_scalar_is_a_part():
    assert kth_largest(lambda: [torch.tensor(-2.5), torch.tensor(1.0)], 1) == 2.5


def test_numbers_that_are_missing_count_as_zeros():
    values = torch.tensor([3.0, -SUBNORMAL])
    found = [kth_largest(lambda: [values], k) for k in range(1, 5)]
    assert found == [3.0, SUBNORMAL, 0.0, 0.0]


def test_the_share_of_no_numbers_is_0():
    assert kth_largest(list, share_of(0, 20.0)) == 0.0
    assert kth_largest(lambda: [torch.zeros(0, 4)], 1) == 0.0


def test_the_parts_are_left_alone():
    values = torch.tensor([[-3.0, 2.0], [-1.0, 0.0]])
    kth_largest(lambda: [values], 2)
    np.testing.assert_array_equal(values.numpy(), [[-3.0, 2.0], [-1.0, 0.0]])


def test_histograms_of_parts_add_up():
    values = drawn("of every size", 500)
    whole = torch.from_numpy(values)
    counts = sum(histogram(part) for part in in_parts(values, [3, 100, 444]))
    assert torch.equal(counts, histogram(whole))
    assert counts.shape == (BUCKETS,)
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == 500
    bucket = int(counts.argmax())
    inside = sum(histogram(part, bucket) for part in in_parts(values, [3, 100, 444]))
    assert torch.equal(inside, histogram(whole, bucket))
    assert int(inside.sum()) == int(counts[bucket])


def test_a_magnitude_is_its_two_buckets():
    # 1 is 0x3F800000, and the next number is one more.
    counts = histogram(torch.tensor([-1.0, 1.0, 1.0 + 2.0**-23]))
    assert int(counts[0x3F80]) == 3
    inside = histogram(torch.tensor([-1.0, 1.0, 1.0 + 2.0**-23]), 0x3F80)
    assert inside[:3].tolist() == [2, 1, 0]
    assert magnitude(0x3F80, 1) == 1.0 + 2.0**-23
    assert magnitude(0x7F7F, 0xFFFF) == LARGEST
    assert magnitude(0, 1) == SUBNORMAL


def test_counts_beyond_any_float_are_exact():
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    counts[9], counts[4], counts[2] = 2**55 + 1, 1, 2**55
    assert locate(counts, 2**55 + 1) == (9, 2**55 + 1)
    assert locate(counts, 2**55 + 2) == (4, 1)
    assert locate(counts, 2**55 + 3) == (2, 1)
    assert locate(counts, 2**56 + 2) == (2, 2**55)
    assert locate(counts, 2**56 + 3) == (0, 1)


def test_the_last_bucket_is_one_like_the_others():
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    counts[-1], counts[-2] = 2, 1
    assert [locate(counts, k) for k in (1, 2, 3)] == [
        (BUCKETS - 1, 1),
        (BUCKETS - 1, 2),
        (BUCKETS - 2, 1),
    ]


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
