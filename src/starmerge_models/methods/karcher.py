"""The Karcher mean of the weights' directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta
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


@method("karcher")
class Karcher(Merge):
    """Average the directions of the weights on the sphere, and their lengths, tensor by tensor.

    With u_t = W_t / ‖W_t‖, m is the point of the unit sphere with the least sum of squared angles
    to all u_t; the result is m · Σ ‖W_t‖ / K over the K models. The iteration for m starts at the
    normalised mean of the u_t and takes steps along the mean of the tangents,
    m ← exp_m(Σ log_m(u_t) / K), until a step is shorter than ``tol``.

    Source: Karcher, Riemannian center of mass and mollifier smoothing, Comm. Pure Appl. Math. 30,
    1977; mergekit's karcher, with its tolerance and number of steps.
    Cost: inner products of all pairs of weights; the result is dense.
    When to use: as a generalisation of slerp to more than two models.
    """

    max_iter: Annotated[int, Field(ge=1, description="most steps to take")] = 10
    tol: Annotated[
        float,
        Field(
            gt=0,
            description="step length at which the iteration ends; shorter weights count as zero",
        ),
    ] = 1e-5
    with_base: Annotated[bool, Field(description="whether the base is one of the models")] = False

    @property
    def needs_base(self) -> bool:
        """True: the angles are those between weights."""
        return True

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse weights; see :meth:`Method.check`."""
        refuse_weights(self, tasks, weights, "all models count alike")

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
        first = 0 if self.with_base else 1
        c = torch.zeros(len(products), dtype=torch.float64)
        c[first:] = self._mean(weights_gram(products)[first:, first:])
        return task_vector_coefficients(c)

    def _mean(self, G: Tensor) -> Tensor:
        """Return the coefficients (K,) of the weights in their mean, given their Gram matrix."""
        norms = gram_norms(G)
        valid = norms > self.tol
        if not valid.any():
            return torch.zeros_like(norms)
        # All vectors are written in the basis of the unit vectors u_t, whose Gram matrix is C.
        C = (G / (norms[:, None] * norms))[valid][:, valid]
        share = 1 / len(C)
        m = torch.full((len(C),), share, dtype=torch.float64)
        length = _length(m, C)
        m = torch.eye(len(C), dtype=torch.float64)[0] if length < self.tol else m / length
        for _ in range(self.max_iter):
            cosines = (C @ m).clamp(-1, 1)
            theta = cosines.acos()
            # Near θ = 0 the tangent vanishes; at θ = π it is undefined.
            slope = torch.where(
                (theta >= self.tol) & (theta < math.pi), share * theta / theta.sin(), 0.0
            )
            tangent = slope - (slope @ cosines) * m
            step = _length(tangent, C)
            if step < self.tol:
                break
            m = math.cos(step) * m + math.sin(step) / step * tangent
            m = m / _length(m, C)
        c = torch.zeros_like(norms)
        c[valid] = m / norms[valid] * norms.mean()
        return c


def _length(c: Tensor, C: Tensor) -> float:
    return math.sqrt(max(0.0, float(c @ C @ c)))
