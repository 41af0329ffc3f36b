"""DoRA: a change of a weight's direction, and a magnitude for each of its outputs or inputs.

Liu et al. 2024, arXiv 2402.09353, equation 5. The axis of the norms depends on the tool: PEFT
(github.com/huggingface/peft, ``tuners/lora/dora.py``) has a norm for each output, LyCORIS
(github.com/KohakuBlueleaf/LyCORIS, ``lycoris/functional/general.py``) for each output or input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank, compute_dtype

_PANEL = 2**22
"""Entries in one float64 panel."""


def dora_delta(
    base: Tensor,
    update: Delta,
    magnitude: Tensor,
    *,
    transposed: bool,
    axis: int = 0,
    epsilon: float = 0.0,
) -> Dense:
    """Return W' − W, with W' = m·(W + δ)/(‖W + δ‖ + ε) and a norm for each output, or input.

    Computed in float64 by panels, and rounded once.

    Args:
        base: W, any floating dtype, in the base's layout: (out, in…), or (in, out).
        update: δ as a matrix (out, in·k), such as s·B·A.
        magnitude: m, with one entry for each output (or input), in any shape.
        transposed: Whether W is stored as (in, out), as in some linear layers, and in embeddings,
            whose outputs are the columns of the table.
        axis: 0 for a norm of each output, 1 for a norm of each input.
        epsilon: ε.

    Returns:
        The delta in the shape of W, in float32, or in float64 if W is float64. With ε = 0 it has a
        NaN where a slice of W + δ is zero, whose direction is undefined.
    """
    delta = torch.empty(base.shape, dtype=compute_dtype(base.dtype))
    weight, target = (t.T if transposed else t for t in (base, delta))
    weight, target = _as_inputs_and_kernel(weight), _as_inputs_and_kernel(target)
    m = magnitude.double().flatten()
    count = max(1, _PANEL * weight.shape[axis] // max(1, weight.numel()))
    for start in range(0, weight.shape[axis], count):
        panel = slice(start, start + count)
        slices = (panel, slice(None)) if axis == 0 else (slice(None), panel)
        before = weight[slices].double()
        after = before + _entries(update, slices, weight.shape)
        others = [dim for dim in range(3) if dim != axis]
        norms = torch.linalg.vector_norm(after, dim=others, keepdim=True) + epsilon
        sizes = [-1 if dim == axis else 1 for dim in range(3)]
        target[slices] = after.mul_(m[panel].view(sizes) / norms).sub_(before)
    return Dense(delta)


def _as_inputs_and_kernel(weight: Tensor) -> Tensor:
    """Return a view (out, in, k) of a weight; k is 1 for linear layers."""
    return weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(-1)


def _entries(update: Delta, slices: tuple[slice, slice], shape: torch.Size) -> Tensor:
    """Return the entries of a change (out, in, k) for slices of outputs and inputs."""
    outputs, inputs = slices
    if isinstance(update, LowRank):
        A = update.A.view(-1, *shape[1:])[:, inputs].double()
        rows = update.B[outputs].double() * update.scale @ A.flatten(1)
        return rows.view(-1, *A.shape[1:])
    return update.matrix.view(shape)[slices].double()
