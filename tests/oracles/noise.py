"""Rounding noise, from the definitions: ulps, moments of a rounded normal variable, the edge."""

import math

import numpy as np
import torch

ULP_OF_ONE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
LEAST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}


def ulp(values, dtype):
    """Distance of the numbers next to each stored value, away from zero."""
    magnitude = np.abs(values.to(dtype).double().numpy())
    with np.errstate(divide="ignore"):
        binade = np.floor(np.log2(magnitude))
    return np.maximum(ULP_OF_ONE[dtype] * np.exp2(binade), LEAST[dtype])


def normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def normal_pdf(x):
    return math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def rounded_normal(s):
    """E[q^2] and E[q x]/E[x^2] for x ~ N(0, s^2) and q = x rounded to an integer.

    Sums over the values of q, from its probabilities and its partial means; where s is so large
    that nothing is left of the grid, uniform rounding.
    """
    if s > 3.0:
        return s * s + 1.0 / 12.0, 1.0
    second = product = 0.0
    for k in range(-int(12 * s) - 2, int(12 * s) + 3):
        low, high = (k - 0.5) / s, (k + 0.5) / s
        second += k * k * (normal_cdf(high) - normal_cdf(low))
        product += k * s * (normal_pdf(low) - normal_pdf(high))
    return second, product / s**2


def residual(s):
    """Variance of what of q does not follow x."""
    second, gain = rounded_normal(s)
    return second - gain**2 * s**2


def scale_of_row(ulps, energy):
    """The s at which updates N(0, s^2) on grids of these ulps have this energy in all."""
    steps, counts = np.unique(ulps, return_counts=True)
    low, high = 0.0, 4.0 * steps[-1] + 4.0 * math.sqrt(energy)
    for _ in range(60):
        s = (low + high) / 2
        expected = sum(
            c * u * u * rounded_normal(s / u)[0]
            for u, c in zip(steps, counts, strict=True)
            if s > 0.02 * u
        )
        low, high = (low, s) if expected > energy else (s, high)
    return high


def edge(variances):
    """Norm of the free operator with these variances, to 1e-4: where its Dyson equation breaks.

    Above the edge the iteration p = 1/(z - V q), q = 1/(z - V' p) from q = 0 increases to a
    solution, below it leaves the positive numbers.
    """
    rows, columns = variances.sum(1), variances.sum(0)
    low = math.sqrt(max(rows.max(), columns.max()))
    high = math.sqrt(rows.max()) + math.sqrt(columns.max())
    while high - low > 1e-4 * high:
        z = (low + high) / 2
        low, high = (low, z) if _has_solution(variances, z) else (z, high)
    return high


def _has_solution(variances, z):
    q = np.zeros(variances.shape[1])
    for _ in range(20_000):
        p = z - variances @ q
        if p.min() <= 0:
            return False
        following = z - variances.T @ (1 / p)
        if following.min() <= 0:
            return False
        if np.max(np.abs(1 / following - q)) < 1e-9 / z:
            return True
        q = 1 / following
    return False
