"""The own-response scale: a factor that tunes itself to the task vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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

        def products(merged: Delta, deltas: Deltas, tensor: TensorContext) -> Tensor:
            return own_products(merged, deltas.items(), tensor)

        responses, count, mean = own_responses(walk(products), self.name)
        c = max(1, count) ** -0.125 if self.c == "auto" else self.c
        return Response(responses, factor_to(c, mean, self.name, "Leave the step out"))

    def apply(
        self, merged: Delta, deltas: Deltas, tensor: TensorContext, survey: Response
    ) -> Delta:
        """Scale one tensor; see :meth:`PostStep.apply`."""
        return merged.scaled(survey.factor)


def own_products(
    merged: Delta, deltas: Iterable[tuple[int, Delta]], tensor: TensorContext
) -> Tensor:
    """Return what one tensor adds to the own responses: ⟨M, τ_t⟩, ‖τ_t‖² and w_t, (3, T) float64.

    Args:
        merged: M.
        deltas: t and τ_t of the tasks that count.
        tensor: The tensor.
    """
    found = torch.zeros(3, len(tensor.tasks), dtype=torch.float64)
    found[2] = torch.tensor(tensor.weights, dtype=torch.float64)
    for t, tau_t in deltas:
        found[0, t], found[1, t] = merged.inner(tau_t), tau_t.frobenius() ** 2
    return found


def own_responses(products: Iterable[Tensor], name: str) -> tuple[list[float], int, float]:
    """Return the own response of each task over the whole model, and their weighted mean.

    Args:
        products: Of each tensor, :func:`own_products`.
        name: The method, for the error message.

    Returns:
        r_t by task, 0 for a zero task vector; how many are not zero; and their mean, 0 of none and
        where they cancel but for the rounding of float32.

    Raises:
        UsageError: The weights of the tasks that change anything sum to zero.
    """
    inner = energy = weights = torch.zeros((), dtype=torch.float64)
    for found in products:
        inner, energy, weights = inner + found[0], energy + found[1], found[2]
    # Factors whose terms cancel leave rounding, to which any merge responds without measure.
    alive = energy > CANCELLED**2 * energy.max()
    r = torch.where(alive, inner / torch.where(alive, energy, 1.0), 0.0)
    if alive.any() and sums_to_zero(weights[alive].tolist()):
        raise UsageError(
            f"{name}: the weights of the models that change anything sum to zero, and the "
            "mean response is divided by their sum. Change one, or leave the method out."
        )
    if not alive.any():
        return r.tolist(), 0, 0.0
    parts = (weights * r)[alive]
    cancels = parts.sum().abs() < FLOAT32_NOISE * parts.abs().sum()
    mean = 0.0 if cancels else float(parts.sum() / weights[alive].sum())
    return r.tolist(), int(alive.sum()), mean


def factor_to(c: float, mean: float, name: str, remedy: str) -> float:
    """Return the factor that makes the mean own response of a merge a number.

    Args:
        c: The number.
        mean: The mean response of the merge as it is, of :func:`own_responses`.
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
