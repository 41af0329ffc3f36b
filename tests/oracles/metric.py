"""Merging in whitened inputs, by its definition: with the symmetric root of the second moment."""

import numpy as np
import torch

from starmerge_models.spectral.metric import Inputs
from starmerge_models.spectral.moment import Moment
from tests.oracles import samples


def ridged(sigma, ridge=1.0):
    """Sigma + rho c I, c = tr Sigma / n; I for a Sigma of zeros."""
    n = len(sigma)
    c = np.trace(sigma) / n
    return sigma + ridge * c * np.eye(n) if c > 0 else np.eye(n)


def symmetric_roots(sigma, ridge=1.0):
    """The symmetric root of the ridged Sigma, and its inverse."""
    values, vectors = np.linalg.eigh(ridged(sigma, ridge))
    return (vectors * values**0.5) @ vectors.T, (vectors * values**-0.5) @ vectors.T


def in_whitened_inputs(merge, deltas, sigma, side="columns", ridge=1.0):
    """What merge(matrices) makes in whitened inputs, brought back."""
    root, inverse = symmetric_roots(sigma, ridge)
    if side == "columns":
        return merge([delta @ root for delta in deltas]) @ inverse
    return inverse @ merge([root @ delta for delta in deltas])


def inputs_of(n, *, side="columns", k=None, seed=0, roots=None):
    """Inputs of n entries with one large direction, as models have; and their Sigma, float64.

    Args:
        k: Rows of the root; n by default.
        roots: Of each task, for moments of their own.
    """
    root = one_root(n, k or n, seed)

    def read(task):
        return Moment(root if task is None else roots[task], 7)

    return Inputs(side, read), sigma_of(root)


def one_root(n, k, seed):
    """A root (k, n), float32, whose first direction has ten times the size of the others."""
    root = samples.normal(k, n, seed=seed)
    direction = samples.normal(n, seed=seed + 1)
    root[0] = 10 * direction
    return root


def sigma_of(root):
    """Sigma of a root, float64."""
    exact = root.double().numpy()
    return exact.T @ exact


def identity(n, side="columns"):
    """Inputs that are white already."""
    return Inputs(side, lambda task: Moment(torch.eye(n), n))
