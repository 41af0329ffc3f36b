"""The second moment of inputs, by its definition."""

import numpy as np

from tests.oracles.bounds import U32, U64


def second_moment(inputs):
    """E[x xᵀ] of the rows of a float64 matrix."""
    return sum(np.outer(x, x) for x in inputs) / len(inputs)


def rounding(moment):
    """How far RᵀR may be from Σ, entry by entry, with R rounded to float32.

    Two roundings of products |R|ᵀ|R|, whose entries are at most √(Σ_ii Σ_jj) by Cauchy-Schwarz, and
    what the pivoted Cholesky decomposition leaves out: a matrix with entries of at most
    n u max Σ_ii, beside its own rounding of a few times as much.
    """
    diagonal = np.diag(moment)
    products = np.sqrt(np.outer(diagonal, diagonal))
    return 2.1 * U32 * products + 8 * len(moment) * U64 * diagonal.max()
