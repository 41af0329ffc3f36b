"""What an adapter makes of a weight, as float64 arrays, and how far float32 may be from it."""

import numpy as np

from tests.oracles.bounds import U32, gamma
from tests.oracles.deltas import exact


def product(B, A, scale):
    """Entry (o, i, ...) = scale * sum over r of B[o, r] * A[r, i, ...]."""
    B = exact(B)
    return float(scale) * np.einsum("or,r...->o...", B.reshape(B.shape[:2]), exact(A))


def rows(weight):
    """A weight as one row an output."""
    return weight.reshape(len(weight), -1)


def plain(W, B, A, scale, transposed):
    """The folded weight W + sBA or W + (sBA)^T, and the error of computing that in float32.

    A term meets its product, the scale and the additions; then the sum with W is rounded.
    """
    update = product(B, A, scale)
    size = product(abs(B), abs(A), abs(scale))
    if transposed:
        update, size = update.T, size.T
    folded = exact(W) + update
    return folded, gamma(A.shape[0] + 3, U32) * size + U32 * abs(folded)


def dora(W, B, A, scale, m, transposed):
    """The folded weight m V / |V| with V = W + sBA, and the error of computing it in float32.

    The norm is taken over a row of (out, in). Its relative error is that of V in the norm, and of
    summing as many squares as the row is long.
    """
    W, m = exact(W), exact(m).reshape(-1, 1)
    shape = W.shape
    W = W.T if transposed else rows(W)
    V = W + rows(product(B, A, scale))
    error = gamma(A.shape[0] + 4, U32) * (abs(W) + rows(product(abs(B), abs(A), abs(scale))))
    length = np.linalg.norm(V, axis=1, keepdims=True)
    relative = np.linalg.norm(error, axis=1, keepdims=True) / length + gamma(V.shape[1] + 4, U32)
    folded = m * V / length
    bound = abs(m) / length * error + 2 * relative * abs(folded)
    if transposed:
        return folded.T, bound.T
    return folded.reshape(shape), bound.reshape(shape)
