"""``starmerge methods``."""

from __future__ import annotations

import inspect
import json as jsonlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from starmerge.methods import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="Say all about this one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the merging methods, or explain one: definition, source, cost, parameters."""
    from starmerge.errors import UsageError, nearest
    from starmerge.methods import METHODS

    if name is not None and name not in METHODS:
        raise UsageError(f"No method is called {name!r}.{nearest(name, METHODS)}")
    chosen = [METHODS[name]] if name else list(METHODS.values())
    if json:
        print(jsonlib.dumps([_described(method) for method in chosen], indent=2))
    elif name is None:
        for method in chosen:
            summary = inspect.cleandoc(method.__doc__ or "").splitlines()[0]
            print(f"{method.name:<18}{summary}")
    else:
        described = _described(chosen[0])
        print(f"{name}\n\n{described['description']}\n")
        for parameter in described["parameters"]:
            print(f"-p {parameter['name']}={parameter['default']}: {parameter['description']}")


def _described(method: type[Method]) -> dict[str, Any]:
    from pydantic import TypeAdapter

    schema = TypeAdapter(method).json_schema()
    return {
        "name": method.name,
        "description": inspect.cleandoc(method.__doc__ or ""),
        "parameters": [
            {"name": key, **{k: v for k, v in entry.items() if k != "title"}}
            for key, entry in schema.get("properties", {}).items()
        ],
    }
