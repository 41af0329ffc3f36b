"""How far a correct computation may be from the exact value: derived, not fitted.

Rounding counts follow Higham, Accuracy and Stability of Numerical Algorithms: k roundings in a row
change a value by at most gamma(k) of its magnitude.
"""

import numpy as np

from starmerge_models.deltas import LowRank
from tests.oracles import deltas as oracle

U32 = 2.0**-24
U64 = 2.0**-53


def gamma(roundings, unit):
    """Higham's k u / (1 - k u)."""
    return roundings * unit / (1.0 - roundings * unit)


def magnitude(delta):
    """Entry by entry the sum of the absolute terms: |s| |B| |A|, or |delta|."""
    if isinstance(delta, LowRank):
        return abs(delta.scale) * (np.abs(oracle.exact(delta.B)) @ np.abs(oracle.exact(delta.A)))
    return np.abs(oracle.as_matrix(oracle.exact(delta.tensor)))


def terms(delta):
    """Number of products that are summed for one entry."""
    return delta.rank if isinstance(delta, LowRank) else 1


def weighted_sum(deltas, weight=1.0):
    """Entrywise error of weight * sum(deltas) computed in float32.

    A term meets two conversions of its factors, the scale and the weight (conversion and product
    each), its own product, and the additions of all terms.
    """
    roundings = sum(map(terms, deltas)) + 7
    return gamma(roundings, U32) * abs(weight) * sum(map(magnitude, deltas))


def inner(left, right):
    """Error of <left, right> computed in float64, in factors or entry by entry; twice, for both."""
    m, n = left.shape
    roundings = m * n + m + n + terms(left) * terms(right) + 4
    return 2.0 * gamma(roundings, U64) * float(np.sum(magnitude(left) * magnitude(right)))


def balanced(delta):
    """Float64 factors of delta / scale in which b_k is as long as a_k; dead columns left out."""
    B, A = oracle.exact(delta.B), oracle.exact(delta.A)
    b, a = np.linalg.norm(B, axis=0), np.linalg.norm(A, axis=1)
    alive = (b > 0) & (a > 0)
    balance = np.sqrt(a[alive] / b[alive])
    return B[:, alive] * balance, A[alive] / balance[:, None]


def spectrum(delta):
    """Error of each singular value computed in float64.

    Dense: backward stability, a modest multiple of u ||delta||.

    Low-rank, from the Gram matrices of the balanced factors X and Y, both of Frobenius norm
    sqrt(beta): a Gram matrix is known to E = c u beta; its square root to E / sigma_min of the
    factor, over the directions that are not zero, and to sqrt(E) whatever the factor, so if one
    of the directions may be taken for rounding. The root's error meets the other factor's norm.
    """
    m, n = delta.shape
    if not isinstance(delta, LowRank):
        return 8 * (m + n) * U64 * oracle.frobenius(magnitude(delta))
    X, Y = balanced(delta)
    if X.size == 0 or Y.size == 0:
        return 0.0
    beta = oracle.frobenius(X) * oracle.frobenius(Y)
    units = 2 * (m + n + 4 * delta.rank) * U64
    x, y = oracle.singular_values(X), oracle.singular_values(Y)
    x_least, y_least = x[x > 1e-12 * x[0]][-1], y[y > 1e-12 * y[0]][-1]
    error = 2.0 * np.sqrt(units)
    if min(x_least / x[0], y_least / y[0]) > 2e-6:
        error = min(error, units * (1.0 + y[0] / x_least + x[0] / y_least))
    return abs(delta.scale) * beta * error


def condition(delta):
    """Condition of the worse of the two balanced factors, over the directions not zero."""
    worst = 1.0
    for factor in filter(np.size, balanced(delta)):
        sigma = oracle.singular_values(factor)
        worst = max(worst, float(sigma[0] / sigma[sigma > 1e-12 * sigma[0]][-1]))
    return worst


def orthonormality(delta):
    """Error of each entry of UᵀU for bases that Gram matrices give: c u condition²."""
    m, n = delta.shape
    if not isinstance(delta, LowRank):
        return 8 * (m + n) * U64
    return 2 * (m + n + 4 * delta.rank) * U64 * condition(delta) ** 2 * delta.rank


def gap(sigma, r):
    """How far the kept part of a spectrum is from the dropped, relative to the largest."""
    if r in (0, len(sigma)) or sigma[0] == 0.0:
        return 1.0
    return float((sigma[r - 1] - sigma[r]) / sigma[0])


def is_rounding(delta, sigma):
    """Whether the terms of a delta cancel, so that rounding is all that may be left of them."""
    return spectrum(delta) > 0.0 and float(np.sum(sigma)) <= 2 * len(sigma) * spectrum(delta)


def truncation(delta, sigma, r):
    """Frobenius error of a delta truncated to r triplets and stored as float32 factors.

    The float64 SVD is that of a matrix within E of the delta. By Wedin the kept subspace moves
    by 2 E / gap; the rescale factor moves by E for each singular value. Then float32: two factor
    roundings, and r products and sums when it is multiplied out, of sum(sigma') in all.
    """
    if is_rounding(delta, sigma):
        return 4 * len(sigma) * spectrum(delta)
    if r == 0:
        return 0.0
    k, nuclear = len(sigma), float(np.sum(sigma))
    factor = nuclear / float(np.sum(sigma[:r]))
    backward = np.sqrt(k) * spectrum(delta) * (1.0 + 4.0 / gap(sigma, r) + 2.0 * k)
    return gamma(r + 5, U32) * nuclear + factor * backward
