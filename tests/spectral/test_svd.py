"""Which kernel decomposes a delta, and how long the result is remembered."""

import gc
import logging
import threading
import weakref

import numpy as np
import pytest
import torch

from starmerge_models.deltas import Dense, LowRank, Stored
from starmerge_models.spectral import (
    SVD,
    GramSVD,
    UncertainError,
    svd,
    truncate_and_rescale,
    with_exact_fallback,
)
from tests.oracles import samples, star


def stored(m=150, n=140):
    base = samples.normal(m, n, seed=1)
    return Stored([(1.0, base + samples.normal(m, n, seed=2))], base)


DELTAS = {
    "low-rank": lambda: samples.low_rank(9, 7, 3),
    "small": lambda: samples.dense(9, 7),
    "large": lambda: samples.dense(150, 140),
    "stored": stored,
}


@pytest.mark.parametrize("kind", DELTAS)
def test_the_kernel_that_fits(kind):
    delta = DELTAS[kind]()
    assert isinstance(svd(delta), GramSVD) == (kind in ("large", "stored"))
    assert isinstance(delta, LowRank) or torch.equal(svd(delta).exact().S, _exact(delta))


def _exact(delta):
    return torch.linalg.svd(delta.matrix.double(), full_matrices=False).S


@pytest.mark.parametrize("kind", DELTAS)
def test_it_is_remembered_as_long_as_the_delta_lives(kind):
    delta = DELTAS[kind]()
    found = svd(delta)
    found.first(2)
    found.exact()
    assert svd(delta) is found
    delta_alive, found_alive = weakref.ref(delta), weakref.ref(found)
    del delta, found
    gc.collect()
    assert delta_alive() is found_alive() is None


def test_equal_deltas_are_not_mistaken_for_each_other():
    delta = samples.dense(150, 140)
    assert svd(Dense(delta.tensor)) is not svd(delta)


def test_the_result_outlives_the_delta():
    delta = stored()
    expected = svd(delta).first(3)
    found = svd(stored())
    gc.collect()
    assert torch.equal(found.first(3).U, expected.U)


def test_several_threads_get_the_same():
    deltas = [samples.dense(150, 140, seed=seed) for seed in range(3)]
    found = [[] for _ in deltas]
    barrier = threading.Barrier(4)

    def work():
        barrier.wait()
        for results, delta in zip(found, deltas, strict=True):
            decomposed = svd(delta)
            results.append((decomposed, decomposed.first(20)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in found:
        assert len(results) == 4
        first, triplets = results[0]
        for other, others in results[1:]:
            assert other is first
            assert torch.equal(others.U, triplets.U)
            assert torch.equal(others.V, triplets.V)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_singular_values_beyond_float32_of_float32_deltas(shape):
    delta = Dense(1e37 * samples.normal(*shape, seed=3))
    found = svd(delta)
    assert float(found.S[0]) > torch.finfo(torch.float32).max / 2
    kept, report = truncate_and_rescale(found, eta=40)
    assert kept.to_dense().isfinite().all()
    expected = star.truncated(samples.exact(delta), report.rank)
    difference = np.linalg.norm(samples.values(kept) - expected)
    assert difference <= 1e-5 * np.linalg.norm(expected)


def test_what_is_not_certain_is_done_again_with_the_exact_svd(caplog):
    caplog.set_level(logging.DEBUG, logger="starmerge_models.spectral")
    decomposed = svd(samples.dense(150, 140))

    def kind(given):
        if isinstance(given, GramSVD):
            raise UncertainError("Too close to call.")
        return type(given)

    assert with_exact_fallback(decomposed, kind) is SVD
    assert caplog.messages == ["Exact SVD: Too close to call."]
    assert with_exact_fallback(decomposed, lambda given: given) is decomposed


def test_what_the_exact_svd_cannot_tell_is_an_error():
    def refuse(given):
        raise UncertainError("Never.")

    with pytest.raises(UncertainError, match=r"Never\."):
        with_exact_fallback(svd(samples.dense(9, 7)), refuse)
