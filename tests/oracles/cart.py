"""CART (arXiv 2412.12153): the average, plus the truncated deviations of the tasks from it."""

from tests.oracles.tsv_m import scale, triplets_of


def truncated(matrix, reference, fraction, rank):
    """The first triplets of a matrix: `rank` of them, or a share of its rank, at least one."""
    U, sigma, Vt = triplets_of(matrix, reference)
    k = max(1, int(fraction * len(sigma))) if rank is None else rank
    return (U[:, :k] * sigma[:k]) @ Vt[:k]


def cart(deltas, fraction=0.08, lam=1.0, rank=None, weights=None):
    """mean + lam * sum of trunc(w_t (delta_t - mean)), the mean weighted by w_t / sum(w)."""
    weights = [1.0] * len(deltas) if weights is None else weights
    mean = sum(w * delta for w, delta in zip(weights, deltas, strict=True)) / sum(weights)
    merged = mean.copy()
    for w, delta in zip(weights, deltas, strict=True):
        deviation = w * (delta - mean)
        merged += lam * truncated(deviation, abs(w) * scale(deltas), fraction, rank)
    return merged
