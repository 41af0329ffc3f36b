"""Cutting off the rounding noise of stored fine-tunes."""

import numpy as np
import pytest
import torch

from starmerge_models.deltas import Dense, Stored
from tests.merge_one import merge_one
from tests.oracles import deltas as oracle
from tests.oracles import samples


def stored(rank, dtype, *, seed=0, m=96, n=64, size=0.02):
    """A base, an update, and its delta out of a fine-tune stored in a dtype."""
    base = samples.normal(m, n, seed=seed)
    update = size * samples.low_rank(m, n, rank, seed=seed + 1).to_dense()
    return base, update, Stored([(1.0, (base + update).to(dtype))], base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_directions_of_the_update_are_what_is_left(dtype, rank):
    base, update, delta = stored(rank, dtype)
    found = merge_one("denoise", [delta], base=base)
    assert np.linalg.matrix_rank(samples.values(found.delta), tol=1e-4) == rank
    (truncation,) = found.truncations
    assert (truncation.rank, truncation.factor) == (rank, 1.0)
    assert truncation.noise.applies
    assert truncation.nuclear_after < truncation.nuclear_before
    sigma = oracle.singular_values(samples.exact(delta))
    assert truncation.nuclear_after == pytest.approx(np.sum(sigma[:rank]), rel=1e-6)
    error = oracle.frobenius(samples.values(found.delta) - oracle.exact(update))
    assert error < 0.7 * oracle.frobenius(samples.exact(delta) - oracle.exact(update))


@pytest.mark.parametrize("merge", ["tsv_m", "iso_c", "cart"])
def test_spectral_merges_of_stored_fine_tunes_come_near_to_those_of_the_updates(merge):
    base = samples.normal(96, 64, seed=0)
    updates = [0.05 * samples.low_rank(96, 64, 3, seed=seed).to_dense() for seed in (1, 2, 3)]
    deltas = [Stored([(1.0, (base + update).bfloat16())], base) for update in updates]
    truth = samples.values(merge_one(merge, [Dense(update) for update in updates]).delta)
    plain = samples.values(merge_one(merge, deltas, base=base).delta)
    denoised = samples.values(merge_one(f"denoise+{merge}", deltas, base=base).delta)
    assert oracle.frobenius(denoised - truth) < 0.25 * oracle.frobenius(truth)
    assert oracle.frobenius(denoised - truth) < 0.5 * oracle.frobenius(plain - truth)


def test_what_has_no_floor_is_left_as_it_is():
    base, _, delta = stored(4, torch.bfloat16)
    adapter = samples.low_rank(96, 64, 4)
    vector = Stored([(1.0, delta.terms[0][1][0])], base[0])
    tuned = (base + 0.3 * samples.normal(96, 64, seed=9)).bfloat16()
    scattered = Stored([(1.0, tuned)], base)
    for other, given in (
        (adapter, base),
        (Dense(delta.tensor), base),
        (delta, None),
        (vector, base[0]),
        (scattered, base),
    ):
        shape = tuple(other.tensor.shape) if isinstance(other, Dense) else None
        found = merge_one("denoise", [other], base=given, shape=shape)
        np.testing.assert_array_equal(samples.values(found.delta), samples.values(other))
    assert merge_one("denoise", [scattered], base=base).truncations[0].rank == 64


def test_embeddings_are_left_as_they_are():
    base, _, delta = stored(4, torch.bfloat16)
    found = merge_one("denoise", [delta], base=base, is_embedding=True)
    np.testing.assert_array_equal(samples.values(found.delta), samples.values(delta))
