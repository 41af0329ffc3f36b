"""How the forward pass of a language model is called, and its logits checked."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from starmerge_models.errors import StarmergeError

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the argument, and of the output, that holds a model's cache. The first is that of
transformers from 5.24 on, which removes the second in 5.40."""


def arguments_of(model: Any) -> frozenset[str]:
    """Return the names of the arguments of a model's forward, below a PEFT adapter on it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(base.forward).parameters)


def cache_name(model: Any) -> str | None:
    """Return the name under which a model takes and returns its cache; None if it takes none."""
    arguments = arguments_of(model)
    return next((name for name in CACHE_NAMES if name in arguments), None)


def last_logits(model: Any, columns: int) -> dict[str, int]:
    """Return the argument that restricts the logits to the last columns, if the model has it."""
    return {"logits_to_keep": columns} if "logits_to_keep" in arguments_of(model) else {}


def check_finite(values: Tensor, rows: Sequence[int], model: Any) -> None:
    """Make sure that a model's logits are finite.

    Args:
        values: One value for each row, (rows,), that is not finite if the row's logits are not.
        rows: The numbers of their prompts.
        model: The model.

    Raises:
        StarmergeError: One of the values is NaN or infinite.
    """
    broken = (~values.isfinite()).nonzero()
    if len(broken):
        name = model.config.name_or_path or type(model).__name__
        raise StarmergeError(
            f"The model {name} gives logits that are NaN or infinite (prompt "
            f"{rows[int(broken[0])]}). Its weights are broken, or too large for their dtype: look "
            "at them, or try dtype float32."
        )
