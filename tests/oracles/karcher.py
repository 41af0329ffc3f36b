"""The Karcher mean of weights on the sphere, as mergekit defines it."""

import math

import numpy as np


def karcher(weights, max_iter=10, tol=1e-5):
    """The mean direction by gradient descent, as long as the weights are on average."""
    lengths = [float(np.linalg.norm(weight)) for weight in weights]
    units = [w / n for w, n in zip(weights, lengths, strict=True) if n > tol]
    if not units:
        return np.zeros_like(weights[0])
    share = 1 / len(units)
    mean = share * sum(units)
    length = np.linalg.norm(mean)
    mean = units[0] if length < tol else mean / length
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = min(1.0, max(-1.0, float(np.sum(mean * unit))))
            theta = math.acos(cosine)
            if theta >= tol:
                tangent = tangent + share * theta / math.sin(theta) * (unit - cosine * mean)
        step = float(np.linalg.norm(tangent))
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        length = np.linalg.norm(mean)
        if length > tol:
            mean = mean / length
    return sum(lengths) / len(lengths) * mean
