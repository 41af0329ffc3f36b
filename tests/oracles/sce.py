"""SCE (arXiv 2408.07990) in mergekit's form: select by variance, weigh by energy, elect signs."""

from fractions import Fraction

import numpy as np


def selected(deltas, topk):
    """Which entries stay: of those that differ between the models, the share of most variance.

    Of equal variances the first in row-major order; variances are compared in float32.
    """
    if topk >= 1:
        return np.ones(deltas[0].shape, dtype=bool)
    variance = np.var(np.stack(deltas), axis=0).astype(np.float32).ravel()
    count = int(Fraction(str(topk)) * int(np.count_nonzero(variance)))
    mask = np.zeros(variance.size, dtype=bool)
    mask[np.argsort(-variance, kind="stable")[:count]] = True
    return mask.reshape(deltas[0].shape)


def sce(deltas, topk=1.0, mask=None, floor=1e-6):
    """The weighted mean of the entries with the elected sign (+1 for zero sums)."""
    mask = selected(deltas, topk) if mask is None else mask
    tau = np.stack(deltas) * mask
    sign = np.where(tau.sum(axis=0) >= 0, 1.0, -1.0)
    energies = np.array([np.mean(x**2) if x.size else 0.0 for x in tau])
    if energies.sum() < floor or energies.sum() == 0:
        energies = np.ones(len(tau))
    omega = energies / energies.sum()
    numerator, mass = np.zeros(tau.shape[1:]), np.zeros(tau.shape[1:])
    for share, x in zip(omega, tau, strict=True):
        agrees = np.sign(x) == sign
        numerator += np.where(agrees, share * x, 0.0)
        mass += np.where(agrees, share, 0.0)
    return numerator / np.maximum(mass, 1e-6)
