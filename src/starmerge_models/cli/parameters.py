"""Methods and their parameters, as the commands that merge take them."""

from __future__ import annotations

from typing import Any

from starmerge_models.errors import UsageError, nearest


def parameters_of(method: str, given: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """Return the parameters that are given for one of several methods.

    Args:
        method: The method, or a chain.
        given: All parameters: METHOD.KEY, or KEY where there is one method.
        methods: All methods.

    Raises:
        UsageError: A parameter names none of the methods, and there are several.
    """
    mine = {}
    for key, value in given.items():
        owner = next((name for name in methods if key.startswith(f"{name}.")), None)
        if owner is None and len(methods) > 1:
            raise UsageError(
                f"-p {key}: of which method? Write METHOD.KEY=VALUE with one of "
                f"{', '.join(methods)}."
            )
        if owner in (None, method):
            mine[key.removeprefix(f"{method}.") if owner else key] = value
    return mine


def weighted(models: list[dict[str, str]], arguments: list[str]) -> list[dict[str, Any]]:
    """Give the models their weights, given as NAME=NUMBER."""
    if not models:
        raise UsageError("There is no model to merge. Give adapters or fine-tunes after the base.")
    weights: dict[str, float] = {}
    for text in arguments:
        name, equals, number = text.rpartition("=")
        if not equals:
            raise UsageError(f"--weight {text}: a weight is given as NAME=NUMBER, as in a=0.5.")
        names = [model["name"] for model in models]
        if name not in names:
            raise UsageError(f"--weight {text}: no model is called {name!r}.{nearest(name, names)}")
        if name in weights:
            raise UsageError(f"--weight {name} is given twice. Leave one out.")
        try:
            weights[name] = float(number)
        except ValueError as error:
            raise UsageError(f"--weight {text}: {number!r} is not a number.") from error
    return [{**model, "weight": weights.get(model["name"], 1.0)} for model in models]
