"""Spherical linear interpolation between the base and one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta
from starmerge_models.errors import UsageError
from starmerge_models.methods.kinds.combination import (
    base_weight,
    combine,
    combine_bytes,
    combined_shape,
    deltas_of_all_tasks,
    gram_norms,
    task_vector_coefficients,
    weights_gram,
)
from starmerge_models.methods.memory import DeltaShape, TensorShape
from starmerge_models.methods.method import Deltas, Merge, TensorContext, method, refuse_weights

_SHORTEST = 1e-8
"""Weights shorter than this have no direction and are divided by 1 instead of their length."""

_PARALLEL = 0.9995
"""For a larger magnitude of the cosine the interpolation is linear."""


@method("slerp")
class Slerp(Merge):
    """Interpolate from the base to one model along the arc between their weights, per tensor.

    With θ the angle between W_0 and W_1 as vectors, the result is
    [sin((1 − t)θ) W_0 + sin(tθ) W_1] / sin θ; where |cos θ| > 0.9995 it is (1 − t) W_0 + t W_1.
    t = 0 is the base, t = 1 the model. Nearly all fine-tunes have such a cosine with their base, so
    that slerp scales their update by t.

    Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; mergekit's slerp.
    Cost: inner products of the weights; an adapter stays low-rank where interpolation is linear.
    When to use: to weaken one model; or for two unlike models, one of them taken as the base.
    """

    t: Annotated[float, Field(ge=0, le=1, description="how far to go from the base")] = 0.5

    @property
    def needs_base(self) -> bool:
        """True: the angle is that between weights."""
        return True

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse weights and more than one model; see :meth:`Method.check`."""
        if len(tasks) != 1:
            raise UsageError(
                f"slerp: there are {len(tasks)} models ({', '.join(tasks)}). It goes from the base "
                "to exactly one; for two task vectors there is nuslerp, for several karcher."
            )
        refuse_weights(self, tasks, weights, "t says how much of the model is taken")

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        return combine_bytes(tensor, "tensor", with_base=True)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Merge.result`."""
        return combined_shape(tensor, "tensor", with_base=True)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        vectors = [base_weight(tensor), *deltas_of_all_tasks(deltas, tensor)]
        return combine(vectors, self._coefficients, tensor, "tensor")

    def _coefficients(self, products: Tensor) -> Tensor:
        G = weights_gram(products)
        norms = gram_norms(G)
        norms = torch.where(norms > _SHORTEST, norms, 1.0)
        cosine = (G[0, 1] / (norms[0] * norms[1])).clamp(-1, 1)
        if cosine.abs() > _PARALLEL:
            return torch.tensor([0.0, self.t], dtype=torch.float64)
        return task_vector_coefficients(on_arc(cosine.acos(), self.t))


def on_arc(theta: Tensor, t: float) -> Tensor:
    """Return [sin((1 − t)θ), sin(tθ)] / sin θ along a new last axis."""
    return torch.stack([((1 - t) * theta).sin(), (t * theta).sin()], -1) / theta.sin()[..., None]
