"""Matrices of given spectra, float64: what deltas look like, and what makes an SVD hard."""

import numpy as np

from tests.oracles import samples


def with_spectrum(sigma, m, n, *, seed=0):
    """A matrix (m, n) of given singular values and random directions."""
    left = samples.orthogonal(m, seed=2 * seed)[:, : len(sigma)]
    return (left * sigma) @ samples.orthogonal(n, seed=2 * seed + 1)[: len(sigma)]


def flat(m, n, seed=0):
    """Independent normal entries."""
    return np.random.default_rng(seed).standard_normal((m, n))


def power_law(m, n, seed=0, exponent=0.5):
    """σ_k = k^-exponent."""
    return with_spectrum(np.arange(1, min(m, n) + 1) ** -exponent, m, n, seed=seed)


def low_rank_and_noise(m, n, seed=0, rank=16, noise=0.3):
    """A product of factors, and noise in every entry."""
    rng = np.random.default_rng(seed)
    product = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
    return product + noise * rng.standard_normal((m, n))


def dominated(m, n, seed=0, factor=1e3):
    """A power law of which the first singular value is ``factor`` times as large."""
    sigma = np.arange(1, min(m, n) + 1) ** -0.5
    sigma[0] *= factor
    return with_spectrum(sigma, m, n, seed=seed)


def clustered(m, n, seed=0):
    """Two values, each of half the directions."""
    k = min(m, n)
    return with_spectrum(np.where(np.arange(k) < k // 2, 3.0, 1.0), m, n, seed=seed)


def deficient(m, n, seed=0):
    """A third of the rows and of the columns is zero."""
    matrix = flat(m, n, seed)
    matrix[: m // 3] = 0
    matrix[:, : n // 3] = 0
    return matrix


def steps(m, n, seed=0):
    """Eight equal values to each power of 1/2, down to 2^-16."""
    sigma = 2.0 ** -np.minimum(np.arange(min(m, n)) // 8, 16)
    return with_spectrum(sigma, m, n, seed=seed)


FAMILIES = {
    "flat": flat,
    "power law": power_law,
    "steep power law": lambda m, n, seed=0: power_law(m, n, seed, exponent=2.0),
    "low rank and noise": low_rank_and_noise,
    "dominated by 1e3": dominated,
    "dominated by 1e5": lambda m, n, seed=0: dominated(m, n, seed, factor=1e5),
    "clustered": clustered,
    "deficient": deficient,
    "steps": steps,
}
