"""mergekit's merges of one model into the base: nearswap and arcee_fusion."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense
from starmerge_models.methods.kinds.combination import base_weight
from starmerge_models.methods.kinds.entrywise import panels
from starmerge_models.methods.method import TensorContext

_SMALLEST = 1e-6
"""Lower limit of differences as divisors of t."""

_EPSILON = 1e-8
"""Constant that is added to each probability."""


def nearswap(delta: Delta, t: float) -> Dense:
    """Move each entry of the base towards the model by at most t: sgn(d) · min(|d|, t).

    mergekit computes min(1, t / max(|d|, 1e-6)) · d, which is smaller for differences between t and
    1e-6.

    Source: mergekit 0.1.5, ``merge_methods/nearswap.py``; invented for QuartetAnemoi-70B by its
    author, alchemonaut.

    Args:
        delta: d = W − W_0.
        t: The largest step, at least 0.
    """
    merged = torch.empty(delta.shape, dtype=torch.float32)
    for rows in panels(delta.shape):
        d = delta.entries(rows).double()
        merged[rows] = ((t / d.abs().clamp(min=_SMALLEST)).clamp(max=1) * d).float()
    return Dense(merged)


def arcee_fusion(delta: Delta, tensor: TensorContext) -> Dense:
    """Take the model's important entries, and the base's other entries.

    The importance of an entry is |d| · KL(p ‖ q), with p and q the softmax of its row (last axis)
    in the model and in the base, and 1e-8 added to each probability. An entry is important if this
    is at least median + 1.5 · (third quartile − first quartile), where a quantile q is the ⌊q(n −
    1)⌋-th smallest importance of the tensor, counted from 0.

    Source: mergekit 0.1.5, ``merge_methods/arcee_fusion.py``, which computes in the models' dtype,
    and in larger tensors uses the quartiles of a million random entries.

    Args:
        delta: d = W − W_0.
        tensor: The tensor, with the base.
    """
    base = base_weight(tensor)
    # A vector is one row. The last axis of a kernel is shorter than a row of its matrix.
    length = prod(tensor.shape) if len(tensor.shape) < 2 else tensor.shape[-1]

    def parts() -> Iterator[tuple[slice, Tensor]]:
        if len(tensor.shape) < 2:
            yield slice(None), delta.entries().double()
            return
        for rows in panels(delta.shape, 2):
            yield rows, delta.entries(rows).double()

    divergences = []
    importance = np.empty(delta.shape)
    for rows, d in parts():
        before = base.entries(rows).double()
        p, q = (torch.softmax(x.reshape(-1, length), -1) + _EPSILON for x in (before + d, before))
        divergence = (p * torch.log(p / q)).sum(-1, keepdim=True)
        divergences.append(divergence)
        importance[rows] = (d.reshape(-1, length).abs() * divergence).reshape(d.shape).numpy()
    threshold = _threshold(importance.reshape(-1))
    merged = torch.empty(delta.shape, dtype=torch.float32)
    for (rows, d), divergence in zip(parts(), divergences, strict=True):
        flat = d.reshape(-1, length)
        kept = torch.where(flat.abs() * divergence >= threshold, flat, 0.0)
        merged[rows] = kept.reshape(d.shape).float()
    return Dense(merged)


def _threshold(importance: np.ndarray) -> float:
    """Return the threshold of importance; reorders ``importance`` in place."""
    places = [int(q * (len(importance) - 1)) for q in (0.25, 0.5, 0.75)]
    importance.partition(places)
    first, median, third = (float(importance[place]) for place in places)
    return median + 1.5 * (third - first)
