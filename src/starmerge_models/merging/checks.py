"""Checks for merges of files and in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from starmerge_models.checkpoints.models import FineTune
from starmerge_models.checkpoints.tensors import TensorInfo
from starmerge_models.deltas import Delta, is_finite
from starmerge_models.errors import StarmergeError, UsageError


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return one weight for each of ``count`` models; all are 1 by default.

    Raises:
        UsageError: The weights are not a list of numbers, not one per model, or not finite.
    """
    if weights is None:
        return (1.0,) * count
    no_numbers = UsageError(f"The weights are {weights!r}. Give a list of numbers, one a model.")
    if isinstance(weights, str | Mapping):
        raise no_numbers
    try:
        factors = tuple(map(float, weights))
    except (TypeError, ValueError) as error:
        raise no_numbers from error
    if len(factors) != count:
        raise UsageError(f"There are {len(factors)} weights for {count} models. Give one for each.")
    if not all(map(math.isfinite, factors)):
        raise UsageError(f"The weights are {list(factors)}. Give finite numbers.")
    return factors


def check_base(tensor: TensorInfo, base: Tensor) -> None:
    """Check that a tensor of the base has neither a NaN nor an infinity.

    Args:
        tensor: The tensor's entry in the header of its file.
        base: The tensor's values.

    Raises:
        StarmergeError: It has a NaN or an infinity.
    """
    if not is_finite(base):
        raise StarmergeError(f"{tensor.file}: tensor {tensor.name} has a NaN or an infinity.")


def check_delta(delta: Delta, model: FineTune, tensor: TensorInfo, base: Tensor | None) -> None:
    """Check that a delta has neither a NaN nor an infinity.

    Args:
        delta: The delta.
        model: The model that the delta belongs to.
        tensor: The entry of the base's tensor in the header of its file.
        base: The values of the base's tensor; None if they were not needed.

    Raises:
        StarmergeError: It has a NaN or an infinity; the message names the base or the model as the
            cause.
    """
    if delta.is_finite():
        return
    if base is not None:
        check_base(tensor, base)
    raise StarmergeError(
        f"{model.source}: the update of tensor {tensor.name} has a NaN or an infinity. The "
        "fine-tune diverged, or its file is damaged."
    )
