"""Program that fills a config with the defaults of its class, called by configs.py.

It calls transformers in a separate process; see :mod:`~starmerge_models.checkpoints.isolated`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starmerge_models.checkpoints.isolated import serve


def filled(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
    """Return configs in the notation of the installed transformers, with all keys of their class.

    Args:
        configs: Contents of ``config.json``.

    Returns:
        The filled config for each; None if transformers does not know the model.

    Raises:
        ImportError: transformers is not installed.
    """
    return [_filled(config) for config in configs]


def _filled(config: Mapping[str, Any]) -> dict[str, Any] | None:
    from transformers.models.auto.configuration_auto import (  # noqa: PLC0415  (slow to import)
        CONFIG_MAPPING,
    )

    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        found: dict[str, Any] = json.loads(made.to_json_string(use_diff=False))
    except Exception:  # transformers may raise anything for a config
        return None
    return found


if __name__ == "__main__":
    serve(filled)
