"""Spherical interpolation between two models, of their task vectors or of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta
from starmerge_models.errors import UsageError
from starmerge_models.methods.kinds.combination import (
    Along,
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
from starmerge_models.methods.method import Deltas, Merge, TensorContext, method
from starmerge_models.methods.slerp import on_arc

_SHORTEST = 1e-7
"""Vectors shorter than this are divided by this instead of their length."""

_PARALLEL = 1e-16
"""Up to this value of sin²θ the interpolation is linear."""


@method("nuslerp")
class NuSlerp(Merge):
    """Interpolate between two task vectors along the arc between them, in proportion to weights.

    With t = w_2 / (w_1 + w_2) and θ the angle between τ_1 and τ_2, the update is
    [sin((1 − t)θ) τ_1 + sin(tθ) τ_2] / sin θ; where they are parallel it is (1 − t) τ_1 + t τ_2.
    If the weights cancel, t = 1/2. A zero task vector counts as orthogonal to the other. ``of``
    chooses between task vectors and the weights themselves; ``along`` chooses whether the tensor,
    each row or each column is one vector.

    Source: mergekit's nuslerp. In mergekit, ``of`` is task_vectors if a base model is given, rows
    are nuslerp_flatten=false, and columns are nuslerp_flatten=false with nuslerp_row_wise=true.
    Cost: inner products of the task vectors; adapters stay low-rank with ``along=tensor``.
    When to use: two models in a certain proportion, without the loss of length of an average.
    """

    of: Annotated[
        Literal["task_vectors", "weights"], Field(description="the vectors to interpolate")
    ] = "task_vectors"
    along: Annotated[
        Along, Field(description="whether the tensor, each row or each column is one vector")
    ] = "tensor"

    scaled_inputs = False

    @property
    def needs_base(self) -> bool:
        """Whether the weights themselves are interpolated."""
        return self.of == "weights"

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse other than two models; see :meth:`Method.check`."""
        if len(tasks) != 2:
            raise UsageError(
                f"nuslerp: it merges exactly two models, and here is {len(tasks)} "
                f"({', '.join(tasks)}). For more there is karcher."
            )

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        return combine_bytes(tensor, self.along, with_base=self.needs_base)

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the result; see :meth:`Merge.result`."""
        return combined_shape(tensor, self.along, with_base=self.needs_base)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        w_1, w_2 = tensor.weights
        t = 0.5 if abs(w_1 + w_2) < 1e-6 else w_2 / (w_1 + w_2)
        vectors = deltas_of_all_tasks(deltas, tensor)
        if self.of == "task_vectors":
            return combine(vectors, lambda G: _between(G, t), tensor, self.along)

        def of_weights(products: Tensor) -> Tensor:
            c = _between(weights_gram(products)[..., 1:, 1:], t)
            return task_vector_coefficients(torch.cat([torch.zeros_like(c[..., :1]), c], -1))

        return combine([base_weight(tensor), *vectors], of_weights, tensor, self.along)


def _between(G: Tensor, t: float) -> Tensor:
    """Return the coefficients (..., 2) of two vectors, given their Gram matrices (..., 2, 2)."""
    norms = gram_norms(G).clamp(min=_SHORTEST)
    cosine = (G[..., 0, 1] / norms.prod(-1)).clamp(-1, 1)
    parallel = 1 - cosine**2 <= _PARALLEL
    theta = torch.where(parallel, 0.0, cosine).acos()
    on_line = torch.tensor([1 - t, t], dtype=torch.float64)
    return torch.where(parallel[..., None], on_line, on_arc(theta, t))
