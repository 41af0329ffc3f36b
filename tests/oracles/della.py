"""DELLA's magnitude-ranked dropping (arXiv 2406.11617; mergekit's form of it)."""

import numpy as np


def chances(delta, density, epsilon):
    """The chance of each entry to stay: from density - epsilon for the least of its row to
    density + epsilon for the largest. A vector is one row; of equals the first counts as less."""
    rows = delta.reshape(-1, delta.shape[-1]) if delta.ndim > 1 else delta.reshape(1, -1)
    made = np.empty(rows.shape)
    for i, row in enumerate(rows):
        order = sorted(range(len(row)), key=lambda j: (abs(row[j]), j))
        for rank, j in enumerate(order):
            share = rank / (len(row) - 1) if len(row) > 1 else 0.5
            made[i, j] = density - epsilon + 2 * epsilon * share
    return made.reshape(delta.shape)


def rescaled_l1(delta, mask):
    """The kept entries, as large in sum as all were; as they are where a sum is below 1e-7."""
    kept = np.where(mask, delta, 0.0)
    whole, left = np.abs(delta).sum(), np.abs(kept).sum()
    return kept if min(whole, left) < 1e-7 else kept * (whole / left)


def rescaled_by_chance(delta, mask, chance):
    """The kept entries, each divided by the chance it had."""
    return np.where(mask, delta / chance, 0.0)
