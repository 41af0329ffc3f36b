"""Arguments of a language model's forward pass, and the check of its logits."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from starmerge_models.errors import StarmergeError

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the argument and the output for a model's cache. transformers has the first from 5.24
on, and removes the second in 5.40."""


def arguments_of(model: Any) -> frozenset[str]:
    """Return the argument names of a model's forward, without the wrapper of a PEFT adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(base.forward).parameters)


def cache_name(model: Any) -> str | None:
    """Return the name of a model's cache argument; None if it has no cache."""
    arguments = arguments_of(model)
    return next((name for name in CACHE_NAMES if name in arguments), None)


def last_logits(model: Any, columns: int) -> dict[str, int]:
    """Return the argument that limits the logits to the last columns; {} if the model lacks it."""
    return {"logits_to_keep": columns} if "logits_to_keep" in arguments_of(model) else {}


def check_finite(values: Tensor, rows: Sequence[int], model: Any) -> None:
    """Make sure that a model's logits are finite.

    Args:
        values: (rows,); a row's value must be non-finite if its logits are.
        rows: The indices of the prompts.
        model: The model.

    Raises:
        StarmergeError: One of the values is NaN or infinite.
    """
    broken = (~values.isfinite()).nonzero()
    if len(broken):
        name = model.config.name_or_path or type(model).__name__
        raise StarmergeError(
            f"The model {name} gives logits that are NaN or infinite (prompt "
            f"{rows[int(broken[0])]}). Its weights are broken, or too large for their dtype: "
            "check them, or try dtype float32."
        )
