"""The own-response scale: a factor that tunes itself to the task vectors."""

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

from starmerge.deltas import Delta
from starmerge.errors import StarmergeError, UsageError
from starmerge.methods.method import (
    Deltas,
    MergedWalk,
    PostStep,
    TensorContext,
    method,
    sums_to_zero,
)
from starmerge.methods.scale import Scale
from starmerge.spectral.core_space import CANCELLED, FLOAT32_NOISE


@dataclass(frozen=True)
class Response:
    """How much of the task vectors a merge has."""

    responses: list[float]
    """By task, ⟨M, τ_t⟩/‖τ_t‖²; 0 for a zero task vector."""
    factor: float
    """What the update is multiplied by."""


@method("own_response")
class OwnResponse(PostStep):
    """Scale the whole merge so that the tasks' own responses have the mean c.

    The response of task t is r_t = ⟨M, τ_t⟩/‖τ_t‖² over the whole model: 1 if M does to the task's
    direction what its fine-tune did. The update becomes c · M / mean(r_t), the mean weighted by
    w_t, over the tasks whose task vector is not zero.

    By default c = n^(−1/8) for n tasks whose task vector is not zero: 1 for one, 0.92 for two, 0.77
    for eight, 0.71 for sixteen. The more tasks, the more of an update is interference, and the less
    of it serves.

    Source: our own; the rule is a fit to merges of 2 to 16 adapters (docs/results.md).
    Cost: the merge is made twice, once to look.
    When to use: after ``iso_c`` and ``covariance``, whose scale means nothing by itself. Refused
    after ``scale``, and with weights that sum to zero.
    """

    c: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="mean response after the step; auto: by the number of tasks"),
    ] = "auto"

    def check_before(self, steps: Sequence[PostStep]) -> None:
        """Refuse a factor that this step would take away; see :meth:`PostStep.check_before`."""
        # Between the two, svc would see the factor f as a least response of α/f.
        if any(isinstance(step, Scale) for step in steps):
            raise UsageError(
                "own_response: it finds the factor of the whole merge by itself, so a scale before "
                "it serves nothing. Leave scale out, or put it after own_response."
            )

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse weights that sum to zero; see :meth:`Method.check`."""
        if sums_to_zero(weights):
            raise UsageError(
                "own_response: the weights sum to zero, and the mean response is divided by their "
                "sum. Change one, or leave own_response out."
            )

    def survey(self, walk: MergedWalk) -> Response:
        """Measure the responses; see :meth:`PostStep.survey`."""

        def products(merged: Delta, deltas: Deltas, tensor: TensorContext) -> OwnProducts:
            return OwnProducts.of(merged, deltas.items(), tensor)

        found = total_products(walk(products))
        c = max(1, int(found.alive.sum())) ** -0.125 if self.c == "auto" else self.c
        mean = found.mean_response(self.name)
        return Response(found.responses, factor_to(c, mean, self.name, "Leave the step out"))

    def apply(
        self, merged: Delta, deltas: Deltas, tensor: TensorContext, survey: Response
    ) -> Delta:
        """Scale one tensor; see :meth:`PostStep.apply`."""
        return merged.scaled(survey.factor)


@dataclass(frozen=True, eq=False)
class OwnProducts:
    """What the own responses are made of, over some tensors."""

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
        for t, tau_t in deltas:
            inner[t], energy[t] = merged.inner(tau_t), tau_t.frobenius() ** 2
        return cls(inner, energy, weights, merged.frobenius() ** 2)

    def __add__(self, other: OwnProducts) -> OwnProducts:
        """Return the products over the tensors of both, which are of the same tasks."""
        return OwnProducts(
            self.inner + other.inner,
            self.energy + other.energy,
            self.weights,
            self.merged + other.merged,
        )

    @cached_property
    def alive(self) -> Tensor:
        """Which task vectors are more than rounding, (T,) bool.

        Factors whose terms cancel leave rounding, to which any merge responds without measure.
        """
        return (self.energy > 0) & (self.energy > CANCELLED**2 * self.energy.max())

    @property
    def responses(self) -> list[float]:
        """r_t = ⟨M, τ_t⟩/‖τ_t‖² by task; 0 where the task vector is rounding."""
        return self._r.tolist()

    def mean_response(self, name: str) -> float:
        """Return the weighted mean of the r_t; 0 if no task is alive.

        It is 0 too where it is no more than the rounding of M to float32.

        Args:
            name: The method, for the error message.

        Raises:
            UsageError: The weights of the tasks that are alive sum to zero.
        """
        weights = self.weights[self.alive]
        if not len(weights):
            return 0.0
        if sums_to_zero(weights.tolist()):
            raise UsageError(
                f"{name}: the weights of the models that change anything sum to zero, and the "
                "mean response is divided by their sum. Change one, or leave the method out."
            )
        parts = weights * self._r[self.alive]
        rounding = weights.abs().sum() * math.sqrt(self.merged / self.energy.max())
        return _unless_rounding(parts, rounding) / float(weights.sum())

    def agreement(self) -> float:
        """Return Σ_t w_t⟨M, τ_t⟩; 0 where it is no more than the rounding of M to float32."""
        weights = self.weights[self.alive]
        rounding = weights.abs().sum() * math.sqrt(self.merged * self.energy.max())
        return _unless_rounding(weights * self.inner[self.alive], rounding)

    @property
    def _r(self) -> Tensor:
        return torch.where(self.alive, self.inner / torch.where(self.alive, self.energy, 1.0), 0.0)


def _unless_rounding(parts: Tensor, largest: Tensor) -> float:
    """Return Σ parts, or 0 where that is the rounding of its parts or of what they could be."""
    found = parts.sum()
    is_rounding = found.abs() < FLOAT32_NOISE * max(parts.abs().sum(), largest)
    return 0.0 if is_rounding else float(found)


def total_products(products: Iterable[OwnProducts]) -> OwnProducts:
    """Return the products over all tensors of a model; there is one at least."""
    return reduce(operator.add, products)


def factor_to(c: float, mean: float, name: str, remedy: str) -> float:
    """Return the factor that makes the mean own response of a merge a number.

    Args:
        c: The number.
        mean: The mean response of the merge as it is, of :meth:`OwnProducts.mean_response`.
        name: The method, for the error message.
        remedy: A way out, for the error message.

    Raises:
        StarmergeError: The mean response is not positive.
    """
    if not (math.isfinite(mean) and mean > 0):
        raise StarmergeError(
            f"{name}: the mean response of the tasks to the merge is {mean:.3g}, so no positive "
            f"factor makes it {c:.3g}. {remedy}, or look for tasks that cancel."
        )
    return c / mean
