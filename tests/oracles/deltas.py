"""What a delta is, and what is measured on it, as dense float64 arrays."""

import numpy as np


def exact(stored):
    """The stored values of a torch tensor, unrounded, as float64."""
    return stored.detach().double().numpy()


def low_rank(B, A, scale):
    """delta = scale * B @ A."""
    return float(scale) * (exact(B) @ exact(A))


def full(finetuned, base):
    """delta = W_t - W_base."""
    return exact(finetuned) - exact(base)


def as_matrix(delta):
    """A weight of shape (out, ...) seen as (out, everything else); a scalar as 1 x 1."""
    out = delta.shape[0] if delta.shape else 1
    rest = 1
    for length in delta.shape[1:]:
        rest *= length
    return delta.reshape(out, rest)


def singular_values(delta):
    """Descending singular values of the dense matrix."""
    return np.linalg.svd(delta, compute_uv=False)


def frobenius(delta):
    """Square root of the sum of squared entries."""
    return float(np.sqrt(np.sum(np.square(delta))))


def nuclear(delta):
    """Sum of the singular values."""
    return float(np.sum(singular_values(delta)))


def inner(left, right):
    """Sum of the products of matching entries."""
    return float(np.sum(left * right))
