"""STAR (arXiv 2502.10339): spectral truncation and rescaling of each delta, then the mean."""

import numpy as np


def kept_rank(sigma, eta):
    """Smallest r with sigma_1 + ... + sigma_r >= eta% of the sum; 0 when all are zero."""
    total = float(np.sum(sigma))
    if total == 0.0:
        return 0
    for r in range(1, len(sigma) + 1):
        if float(np.sum(sigma[:r])) * 100.0 >= eta * total:
            return r
    return len(sigma)


def admissible_ranks(sigma, eta, slack):
    """Every rank the rule may give when the spectrum's shares are known to within `slack`.

    A list of one rank unless a partial sum lies within `slack` of the threshold.
    """
    total = float(np.sum(sigma))
    if total == 0.0:
        return [0]
    share = np.cumsum(sigma) / total
    first_possible = int(np.argmax(share + slack >= eta / 100.0)) + 1
    surely_enough = share - slack >= eta / 100.0
    first_sure = int(np.argmax(surely_enough)) + 1 if surely_enough.any() else len(sigma)
    return list(range(first_possible, first_sure + 1))


def rescaled(sigma, r):
    """sigma'_k = sigma_k * sum(sigma) / sum_{k<=r} sigma_k for k <= r."""
    kept = sigma[:r]
    total = float(np.sum(sigma))
    if total == 0.0:
        return kept * 0.0
    return kept * (total / float(np.sum(kept)))


def truncated(delta, r):
    """The delta with its r first singular values kept and rescaled."""
    U, sigma, Vt = np.linalg.svd(delta, full_matrices=False)
    r = min(r, len(sigma))
    return (U[:, :r] * rescaled(sigma, r)) @ Vt[:r]


def truncated_by_eta(delta, eta):
    """The delta truncated to the smallest rank that holds eta% of its nuclear norm."""
    sigma = np.linalg.svd(delta, compute_uv=False)
    return truncated(delta, kept_rank(sigma, eta))


def star(deltas, *, eta=None, rank=None):
    """Mean over the tasks of each truncated delta: by `rank` where given, else by `eta`."""
    if rank is not None:
        return sum(truncated(delta, rank) for delta in deltas) / len(deltas)
    return sum(truncated_by_eta(delta, eta) for delta in deltas) / len(deltas)
