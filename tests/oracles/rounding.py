"""Rounding to the stored formats, and a delta added to a weight, in float64."""

import numpy as np
import torch

FORMATS = {
    torch.float16: (11, -24, 65504.0),
    torch.bfloat16: (8, -133, (2.0 - 2.0**-7) * 2.0**127),
    torch.float32: (24, -149, (2.0 - 2.0**-23) * 2.0**127),
    torch.float64: (53, -1074, float(np.finfo(np.float64).max)),
}
"""By dtype: bits of the significand, exponent of the smallest subnormal, largest finite value."""


def unit_roundoff(dtype):
    """Largest relative error of rounding a normal number to the format."""
    return 2.0 ** -FORMATS[dtype][0]


def smallest_step(dtype):
    """Smallest positive number of the format."""
    return 2.0 ** FORMATS[dtype][1]


def rounded(values, dtype):
    """Nearest number of the format, ties to even; infinity above the largest."""
    if dtype == torch.float64:
        return values
    bits, lowest, largest = FORMATS[dtype]
    _, exponent = np.frexp(values)
    step = np.maximum(exponent - bits, lowest)
    nearest = np.ldexp(np.rint(np.ldexp(values, -step)), step)
    return np.where(np.abs(nearest) > largest, np.copysign(np.inf, values), nearest)


def survived(base, delta, merged, dtype):
    """1 - ||e||^2 / ||delta||^2, e being what rounding changed of the update; at least 0."""
    energy = np.sum(np.square(delta))
    if energy == 0.0:
        return 1.0
    error = (merged - rounded(base, dtype)) - delta
    return max(0.0, 1.0 - float(np.sum(np.square(error)) / energy))
