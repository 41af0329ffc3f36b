"""The own-response scale: a factor computed from the tasks' responses to the merge."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta, Dense
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.methods.memory import TensorShape, products_bytes, scaled_shape
from starmerge_models.methods.method import (
    Deltas,
    MergedWalk,
    PostStep,
    TensorContext,
    method,
)
from starmerge_models.methods.scale import Scale
from starmerge_models.spectral.coordinates import CANCELLED


@dataclass(frozen=True)
class Response:
    """The tasks' responses to a merge, and the factor that normalises them."""

    responses: list[float]
    """By task, ⟨M, τ_t⟩/‖τ_t‖²; 0 for a zero task vector."""
    factor: float
    """The factor that multiplies the update."""


LARGEST = 10.0
"""Upper bound of the norm of the scaled merge, as a multiple of the sum of all tasks' norms."""


@method("own_response")
class OwnResponse(PostStep):
    """Scale the whole merge so that the tasks' own responses have the mean c.

    The response of task t is r_t = ⟨M, τ_t⟩/‖τ_t‖² over the whole model: 1 if M changes the task's
    direction as much as its fine-tune did. The update becomes c · M / r̄ with
    r̄ = Σ_t w_t⟨M, τ_t⟩ / Σ_t |w_t|‖τ_t‖², the mean of the r_t for tasks of equal norm and weight.
    The r_t of a small task vector is unreliable, because large ones contribute much in its
    direction.

    By default c = n^(−1/8) for n tasks whose task vector is not zero: 1 for one, 0.92 for two, 0.77
    for eight, 0.71 for sixteen. With more tasks, a larger part of the update is interference, so a
    smaller scale is better.

    Source: our own; the rule is a fit to merges of 2 to 16 adapters (docs/results.md).
    Cost: the merge runs twice, the first time to measure the responses.
    When to use: after ``iso_c`` and ``covariance``, whose scale is arbitrary. Refused after
    ``scale``. Tasks that cancel each other end the merge with an error.
    """

    c: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="mean response after the step; auto depends on the number of tasks"),
    ] = "auto"

    def check_before(self, steps: Sequence[PostStep]) -> None:
        """Refuse a factor that this step would cancel; see :meth:`PostStep.check_before`."""
        # With svc between the two, a factor f would act like a least response of α/f.
        if any(isinstance(step, Scale) for step in steps):
            raise UsageError(
                "own_response: it finds the factor of the whole merge by itself, so a scale before "
                "it serves nothing. Leave scale out, or put it after own_response."
            )

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        return scaled_shape(tensor).nbytes + products_bytes(tensor)

    @property
    def passes(self) -> int:
        """See :attr:`Method.passes`."""
        return 1

    def survey(self, walk: MergedWalk) -> Response:
        """Measure the responses; see :meth:`PostStep.survey`."""

        def products(merged: Delta, deltas: Deltas, tensor: TensorContext) -> OwnProducts:
            return OwnProducts.of(merged, deltas.items(), tensor)

        found = total_products(walk(products))
        c = max(1, int(found.counts.sum())) ** -0.125 if self.c == "auto" else self.c
        return Response(found.responses, found.factor_to(c, self.name, "Leave the step out"))

    def apply(
        self, merged: Delta, deltas: Deltas, tensor: TensorContext, survey: Response
    ) -> Delta:
        """Scale one tensor; see :meth:`PostStep.apply`."""
        return merged.scaled(survey.factor)


@dataclass(frozen=True, eq=False)
class OwnProducts:
    """Inner products that determine the own responses, summed over some tensors."""

    inner: Tensor
    """⟨M, τ_t⟩ by task, (T,) float64."""
    energy: Tensor
    """‖τ_t‖² by task."""
    weights: Tensor
    """w_t by task."""
    merged: float
    """‖M‖²."""

    @classmethod
    def of(
        cls, merged: Delta, deltas: Iterable[tuple[int, Delta]], tensor: TensorContext
    ) -> OwnProducts:
        """Return the products of one tensor.

        Args:
            merged: M.
            deltas: t and τ_t of the tasks that change the tensor.
            tensor: The tensor.
        """
        inner, energy = torch.zeros(2, len(tensor.tasks), dtype=torch.float64)
        weights = torch.tensor(tensor.weights, dtype=torch.float64)
        if isinstance(merged, Dense):  # convert to float64 once for all tasks
            merged = Dense(merged.matrix.double())
        for t, tau_t in deltas:
            inner[t], energy[t] = merged.inner(tau_t), tau_t.frobenius() ** 2
        return cls(inner, energy, weights, merged.frobenius() ** 2)

    def __add__(self, other: OwnProducts) -> OwnProducts:
        """Return the products summed over the tensors of both; the tasks must be the same."""
        return OwnProducts(
            self.inner + other.inner,
            self.energy + other.energy,
            self.weights,
            self.merged + other.merged,
        )

    @cached_property
    def counts(self) -> Tensor:
        """Mask of the tasks with nonzero weight and a task vector above rounding, (T,) bool.

        Factors whose terms cancel leave rounding, whose response to a merge has no meaning.
        """
        known = (self.energy > 0) & (self.energy > CANCELLED**2 * self.energy.max())
        return known & (self.weights != 0)

    @property
    def responses(self) -> list[float]:
        """r_t = ⟨M, τ_t⟩/‖τ_t‖² by task; 0 for tasks that do not count."""
        found = self.inner / torch.where(self.counts, self.energy, 1.0)
        return torch.where(self.counts, found, 0.0).tolist()

    def factor_to(self, c: float, name: str, remedy: str) -> float:
        """Return the factor of M that makes Σ_t w_t⟨M, τ_t⟩ / Σ_t |w_t|‖τ_t‖² equal to c.

        Args:
            c: The mean response to reach.
            name: The method, for the error message.
            remedy: Advice to the user, for the error message.

        Raises:
            StarmergeError: There is no such positive factor, or the scaled merge would be more than
                :data:`LARGEST` times as large as all task vectors together.
        """
        inner, energy, weights = (
            values[self.counts] for values in (self.inner, self.energy, self.weights)
        )
        if not len(inner):
            mean = 0.0
        else:
            mean = float((weights * inner).sum() / (weights.abs() * energy).sum())
        if not (math.isfinite(mean) and mean > 0):
            raise StarmergeError(
                f"{name}: the mean response of the tasks to the merge is {mean:.3g}, so no "
                f"positive factor makes it {c:.3g}. {remedy}, or look for tasks that cancel."
            )
        size, together = math.sqrt(self.merged), float(energy.sqrt().sum())
        if c / mean * size > LARGEST * together:
            raise StarmergeError(
                f"{name}: the mean response of the tasks to the merge is {mean:.3g}, and to make "
                f"it {c:.3g} the merge would become {c / mean * size / together:.3g} times as "
                f"large as all task vectors together. {remedy}, or look for tasks that cancel."
            )
        return c / mean


def total_products(products: Iterable[OwnProducts]) -> OwnProducts:
    """Return the products summed over all tensors of a model, of which there is at least one."""
    return reduce(operator.add, products)
