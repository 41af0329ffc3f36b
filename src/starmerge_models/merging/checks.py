"""Checks that merges of files and merges in memory share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from starmerge_models.checkpoints.models import FineTune
from starmerge_models.checkpoints.tensors import TensorInfo
from starmerge_models.deltas import Delta, is_finite
from starmerge_models.errors import StarmergeError, UsageError


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return one weight for each of ``count`` models; without any, all are 1.

    Raises:
        UsageError: They are no list of numbers, more or fewer than models, or one is not finite.
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
    """Make sure that a tensor of the base has neither a NaN nor an infinity.

    Args:
        tensor: What its file's header says of it.
        base: The same as it was read.

    Raises:
        StarmergeError: It has one.
    """
    if not is_finite(base):
        raise StarmergeError(f"{tensor.file}: tensor {tensor.name} has a NaN or an infinity.")


def check_delta(delta: Delta, model: FineTune, tensor: TensorInfo, base: Tensor | None) -> None:
    """Make sure that a delta has neither a NaN nor an infinity.

    Args:
        delta: The delta.
        model: Whose it is.
        tensor: The base's tensor, as its file's header has it.
        base: The same as it was read; None where it is not needed.

    Raises:
        StarmergeError: It has one; the message says whose fault that is.
    """
    if delta.is_finite():
        return
    if base is not None:
        check_base(tensor, base)
    raise StarmergeError(
        f"{model.source}: the update of tensor {tensor.name} has a NaN or an infinity. The "
        "fine-tune diverged, or its file is damaged."
    )
