"""Results that are kept as long as their delta."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from starmerge_models.deltas import Stored
from starmerge_models.spectral import memoised
from tests.oracles import samples


@pytest.mark.parametrize("found", [None, 3.0])
def test_a_delta_is_looked_at_once(found):
    looked = []

    @memoised
    def find(delta):
        """Say something."""
        looked.append(delta)
        return found

    one, two = samples.low_rank(5, 4, 2), samples.dense(5, 4)
    three = Stored([(1.0, samples.normal(5, 4, seed=1))], samples.normal(5, 4, seed=2))
    for delta in (one, two, three, two, one):
        assert find(delta) is found
    assert looked == [one, two, three]
    assert find.__doc__ == "Say something."


def test_what_was_found_goes_with_the_delta():
    class Found:
        pass

    @memoised
    def find(delta):
        return Found()

    delta = samples.dense(3, 2)
    known = weakref.ref(find(delta))
    gc.collect()
    assert known() is find(delta)
    del delta
    gc.collect()
    assert known() is None


def test_threads_agree_on_one_result():
    find = memoised(lambda delta: object())
    delta = samples.low_rank(5, 4, 2)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: find(delta), range(200)))
    assert found == {find(delta)}
