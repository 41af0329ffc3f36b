"""mergekit's multislerp: the mean of several directions on the sphere, with the mean length."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from starmerge_models.deltas import Delta
from starmerge_models.errors import StarmergeError
from starmerge_models.methods.kinds.combination import (
    base_weight,
    combine,
    deltas_of_all_tasks,
    gram_norms,
    task_vector_coefficients,
    weights_gram,
)
from starmerge_models.methods.method import Deltas, TensorContext


def multislerp(
    deltas: Deltas, tensor: TensorContext, *, of_weights: bool, normalize: bool, eps: float
) -> Delta:
    """Merge one tensor.

    The vectors x_i are the task vectors, or the weights W_i themselves, each tensor as one vector.
    With u_i = x_i / (‖x_i‖ + ε) and the weighted mean of directions m = Σ w_i u_i, the result is
    cos(ε) · (Σ w_i ‖x_i‖) · m / ‖m‖. mergekit formulates it as an exponential map at m/‖m‖ of the
    weighted mean of the u_i in the tangent space there. This mean is zero, as the u_i are projected
    at their own weighted mean, so the map only adds rounding errors.

    Source: mergekit 0.1.5, ``merge_methods/multislerp.py``; goddard.blog/posts/multislerp.

    Args:
        deltas: The task vectors.
        tensor: The tensor, with the weights w_i.
        of_weights: Whether the x_i are the weights, not the task vectors.
        normalize: Whether the w_i are divided by their sum.
        eps: ε.

    Raises:
        StarmergeError: The directions of three or more models cancel. If two models cancel, the
            result is Σ w_i x_i.
    """
    w = torch.tensor(tensor.weights, dtype=torch.float64)
    if normalize:
        w = w / w.sum()

    def solve(G: Tensor) -> Tensor:
        if len(w) == 1:
            return torch.ones(1, dtype=torch.float64)
        norms = gram_norms(G)
        u = w / (norms + eps)
        mean_norm = float((u @ G @ u).clamp(min=0).sqrt())
        if mean_norm < eps:
            if len(w) > 2 and norms.any():
                raise StarmergeError(
                    f"multislerp: the weighted directions of the models cancel in {tensor.name}, "
                    "so there is no mean direction. Change the weights a little."
                )
            return w
        return math.cos(eps) * (w @ norms) / mean_norm * u

    vectors = deltas_of_all_tasks(deltas, tensor)
    if not of_weights:
        return combine(vectors, solve, tensor, "tensor")

    def of_all(products: Tensor) -> Tensor:
        c = solve(weights_gram(products)[1:, 1:])
        return task_vector_coefficients(torch.cat([torch.zeros(1, dtype=torch.float64), c]))

    return combine([base_weight(tensor), *vectors], of_all, tensor, "tensor")
