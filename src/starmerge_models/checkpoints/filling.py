"""What a config says with the defaults of its class: a program that configs.py runs.

It asks transformers, in a process of its own; see :mod:`~starmerge_models.checkpoints.aside`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starmerge_models.checkpoints.aside import answer_with


def filled(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
    """Return configs in the spelling of the installed transformers, every key of theirs with it.

    Args:
        configs: Contents of ``config.json``.

    Returns:
        For each what transformers makes of it; None if it does not know the model.

    Raises:
        ImportError: transformers is absent.
    """
    return [_filled(config) for config in configs]


def _filled(config: Mapping[str, Any]) -> dict[str, Any] | None:
    from transformers.models.auto.configuration_auto import (  # noqa: PLC0415  (slow to import)
        CONFIG_MAPPING,
    )

    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        found: dict[str, Any] = json.loads(made.to_json_string(use_diff=False))
    except Exception:  # whatever transformers raises of a config
        return None
    return found


if __name__ == "__main__":
    answer_with(filled)
