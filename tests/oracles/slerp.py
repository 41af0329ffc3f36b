"""Spherical interpolation of whole weights (Shoemake 1985; mergekit's slerp and nuslerp)."""

import math

import numpy as np


def slerp(first, second, t):
    """On the arc from `first` to `second`; on the line where they are (anti)parallel to 0.9995."""
    lengths = [np.linalg.norm(weight) for weight in (first, second)]
    a, b = (
        weight / (length if length > 1e-8 else 1.0)
        for weight, length in zip((first, second), lengths, strict=True)
    )
    cosine = min(1.0, max(-1.0, float(np.sum(a * b))))
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * first + math.sin(t * theta) * second) / math.sin(theta)


def nuslerp_vector(first, second, t):
    """The same of two vectors, on the line only where they are parallel to rounding."""
    a, b = (v / max(np.linalg.norm(v), 1e-7) for v in (first, second))
    cosine = min(1.0, max(-1.0, float(np.sum(a * b))))
    if 1 - cosine**2 <= 1e-16:
        return (1 - t) * first + t * second
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * first + math.sin(t * theta) * second) / math.sin(theta)


def nuslerp(first, second, weights, along="tensor"):
    """Of two tensors as one vector, of their rows (last axis), or of their columns (first axis)."""
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    if along == "tensor" or first.ndim < 2:
        return nuslerp_vector(first, second, t)
    if along == "rows":
        rows = first.reshape(-1, first.shape[-1]), second.reshape(-1, second.shape[-1])
        made = [nuslerp_vector(a, b, t) for a, b in zip(*rows, strict=True)]
        return np.stack(made).reshape(first.shape)
    columns = (x.reshape(x.shape[0], -1).T for x in (first, second))
    made = [nuslerp_vector(a, b, t) for a, b in zip(*columns, strict=True)]
    return np.stack(made, axis=1).reshape(first.shape)
