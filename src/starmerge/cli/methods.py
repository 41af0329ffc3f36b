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
    from starmerge.methods import METHODS
    from starmerge.methods.method import find_method

    chosen = [find_method(name)] if name else [METHODS[key] for key in sorted(METHODS)]
    if json:
        print(jsonlib.dumps([_described(method) for method in chosen], indent=2))
    elif name is None:
        print("A merge is a chain: transforms, one merge, post-steps, as in star+ties+svc.")
        for kind in ("transform", "merge", "post-step"):
            print(f"\n{kind}")
            for method in (method for method in chosen if method.kind == kind):
                summary = inspect.cleandoc(method.__doc__ or "").splitlines()[0]
                print(f"  {method.name:<18}{summary}")
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
        "kind": method.kind,
        "description": inspect.cleandoc(method.__doc__ or ""),
        "parameters": [
            {"name": key.rstrip("_"), **{k: v for k, v in entry.items() if k != "title"}}
            for key, entry in schema.get("properties", {}).items()
        ],
    }
