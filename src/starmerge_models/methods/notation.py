"""Parser of a chain and its parameters in one string, such as ``star+ties:star.eta=60,k=30``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from starmerge_models.errors import UsageError

_NEXT = re.compile(r",(?=[\w.]+=)")
"""A comma before the next parameter; commas inside a list or mapping do not match."""

_SETTINGS = re.compile(r"(?<!\.py):")
"""The colon before a chain's parameters; the colon of my.py:Mine does not match."""


def split_settings(text: str) -> tuple[str, list[str]]:
    """Split ``CHAIN[:KEY=VALUE,...]`` into the name of the chain and its unparsed parameters.

    Raises:
        UsageError: Nothing follows the colon.
    """
    name, *rest = _SETTINGS.split(text, maxsplit=1)
    if rest == [""]:
        raise UsageError(f"{text} parameters follow the colon, as in star:eta=60.")
    return name, _NEXT.split(rest[0]) if rest else []


def read_chain(text: str) -> tuple[str, dict[str, Any]]:
    """Parse ``CHAIN[:KEY=VALUE,...]`` into the name of the chain and its parameters.

    Raises:
        UsageError: A parameter has no value, or is given twice.
    """
    name, settings = split_settings(text)
    return name, read_parameters(settings, where=f"{name}: ")


def read_parameters(texts: Sequence[str], *, where: str) -> dict[str, Any]:
    """Parse parameters of the form KEY=VALUE; a value that is not JSON is a string.

    Args:
        texts: The parameters.
        where: Prefix of error messages, such as "-p ".

    Raises:
        UsageError: A parameter has no value, or is given twice.
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
