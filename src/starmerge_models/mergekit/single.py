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
"""Differences below this count as it, where t is divided by them."""

_EPSILON = 1e-8
"""What is added to each probability."""


def nearswap(delta: Delta, t: float) -> Dense:
    """Go from the base to the model by t in each entry at most: the update is sgn(d) · min(|d|, t).

    In mergekit's words min(1, t / max(|d|, 1e-6)) · d, which leaves less of differences between t
    and 1e-6.

    Source: mergekit 0.1.5, ``merge_methods/nearswap.py``; made up for QuartetAnemoi-70B by its
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
    """Take the model's entries where they are important, the base's elsewhere.

    The importance of an entry is |d| · KL(p ‖ q), with p and q the softmax of its row (last axis)
    in the model and in the base, 1e-8 added to each probability. It is important from
    median + 1.5 · (third quartile − first quartile) on, each the ⌊q(n − 1)⌋-th smallest importance
    of the tensor, counted from 0.

    Source: mergekit 0.1.5, ``merge_methods/arcee_fusion.py``, which computes in the models' dtype,
    and takes the quartiles of a million entries, drawn at random, where there are more.

    Args:
        delta: d = W − W_0.
        tensor: The tensor, with the base.
    """
    base = base_weight(tensor)
    # A vector is one row. Rows of kernels are shorter than those of their matrix.
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
    """Return from where on entries are important; brings them into another order."""
    places = [int(q * (len(importance) - 1)) for q in (0.25, 0.5, 0.75)]
    importance.partition(places)
    first, median, third = (float(importance[place]) for place in places)
    return median + 1.5 * (third - first)
