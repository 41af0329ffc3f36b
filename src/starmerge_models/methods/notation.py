"""A chain and its parameters in one text, as people write it: ``star+ties:star.eta=60,k=30``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from starmerge_models.errors import UsageError

_NEXT = re.compile(r",(?=[\w.]+=)")
"""A comma after which a parameter begins; those of a list or mapping are none."""

_SETTINGS = re.compile(r"(?<!\.py):")
"""The colon after which a chain's parameters begin; that of my.py:Mine is none."""


def split_settings(text: str) -> tuple[str, list[str]]:
    """Return the name of a chain and its parameters as they stand in ``CHAIN[:KEY=VALUE,...]``.

    Raises:
        UsageError: Nothing follows the colon.
    """
    name, *rest = _SETTINGS.split(text, maxsplit=1)
    if rest == [""]:
        raise UsageError(f"{text} parameters follow the colon, as in star:eta=60.")
    return name, _NEXT.split(rest[0]) if rest else []


def read_chain(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a chain and its parameters, of ``CHAIN[:KEY=VALUE,...]``.

    Raises:
        UsageError: A parameter has no value, or is given twice.
    """
    name, settings = split_settings(text)
    return name, read_parameters(settings, where=f"{name}: ")


def read_parameters(texts: Sequence[str], *, where: str) -> dict[str, Any]:
    """Read parameters that are given as KEY=VALUE, the value as JSON where it is some.

    Args:
        texts: The parameters.
        where: What errors begin with: "-p ".

    Raises:
        UsageError: One has no value, or is given twice.
    """
    from starmerge_models.parsing import parse_json  # noqa: PLC0415  (imports yaml, for a few texts)

    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{where}{text}: a parameter is given as KEY=VALUE, as in eta=40.")
        if key in values:
            raise UsageError(f"{where}{key} is given twice. Leave one out.")
        try:
            values[key] = parse_json(value)
        except json.JSONDecodeError:
            values[key] = value
        except ValueError as error:
            raise UsageError(f"{where}{key}: the value cannot be read: {error}.") from error
    return values
