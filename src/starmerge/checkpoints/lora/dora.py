"""DoRA: a low-rank change of a weight's direction, and a magnitude for each of its outputs.

Liu et al. 2024, arXiv 2402.09353, equation 5; which axis the norms are taken over is PEFT's rule,
github.com/huggingface/peft, ``tuners/lora/dora.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starmerge.deltas import Dense, LowRank, wide

_PANEL = 2**22
"""Entries that are held in float64 at once."""


def dora_delta(base: Tensor, update: LowRank, magnitude: Tensor, *, transposed: bool) -> Dense:
    """Return W' − W, with W' = m·(W + sBA)/‖W + sBA‖ and a norm for each output.

    Computed in float64 and rounded once, panel by panel.

    Args:
        base: W, any floating dtype, as the base stores it: (out, in…), or (in, out).
        update: s·B·A as a matrix (out, in).
        magnitude: m, with as many entries as there are outputs, in any shape.
        transposed: Whether W is stored as (in, out): linear layers stored input-first, and
            embeddings, whose outputs are the columns of their table.

    Returns:
        The delta in the shape of W, in float32, or in float64 if W is so. It has a NaN where an
        output of W + sBA is zero, and thus without a direction.
    """
    weight = base.T if transposed else base.reshape(update.shape)
    delta = torch.empty(base.shape, dtype=wide(base.dtype))
    target = delta.T if transposed else delta.view(update.shape)
    B, A, m = update.B.double() * update.scale, update.A.double(), magnitude.double().reshape(-1, 1)
    rows = max(1, _PANEL // weight.shape[1])
    for start in range(0, len(weight), rows):
        panel = slice(start, start + rows)
        before = weight[panel].double()
        after = torch.addmm(before, B[panel], A)
        after *= m[panel] / torch.linalg.vector_norm(after, dim=1, keepdim=True)
        target[panel] = after - before
    return Dense(delta)
