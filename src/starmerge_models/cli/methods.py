"""``starmerge methods``."""

from __future__ import annotations

import inspect
import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from starmerge_models.cli.importing import importing
from starmerge_models.cli.printing import AsJson, Printer
from starmerge_models.events import Note, emit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starmerge_models.methods import Method
    from starmerge_models.plugins import Plugin


def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="Say all about this one, or a chain; FILE.py:NAME for one in a file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the merging methods, or explain one, or a chain: definition, source, cost, parameters.

    Those of installed packages are listed with the package.

    Example: starmerge methods star

    Example: starmerge methods star+ties
    """
    with importing():
        from starmerge_models.methods import METHODS

    plugins = METHODS.plugins() if name is None else []
    chosen = [METHODS[key] for key in sorted(METHODS)] if name is None else _chain(name)
    if as_json:
        Printer(as_json).result([_described(method) for method in chosen])
    elif name is None:
        print("A merge is a chain: transforms, one merge, post-steps, as in star+ties+svc.")
        for kind in ("transform", "merge", "post-step"):
            print(f"\n{kind}")
            for method in (method for method in chosen if method.kind == kind):
                summary = inspect.cleandoc(method.__doc__ or "").splitlines()[0]
                origin = METHODS.origin(method)
                print(f"  {method.name:<18}{summary}{f' (of {origin})' if origin else ''}")
    else:
        if len(chosen) > 1:
            order = ", then ".join(f"{method.name} ({method.kind})" for method in chosen)
            print(f"{name}: a chain of {order}\n")
        print("\n\n".join(map(_explained, chosen)))
    print_faults(plugins)


def _chain(name: str) -> list[type[Method]]:
    """Return one method, or those of a chain."""
    from starmerge_models.methods.method import find_method
    from starmerge_models.methods.pipeline import make_pipeline, split_chain

    parts = split_chain(name)
    if len(parts) > 1:
        make_pipeline(name)  # raises for what is no chain
    return list(map(find_method, parts))


def _explained(method: type[Method]) -> str:
    """Return all about a method, in lines."""
    from starmerge_models.methods import METHODS

    described, origin = _described(method), METHODS.origin(method)
    text = re.sub(r":\w+:|``|`", "", described["description"])
    of = f", of {origin}" if origin else ""
    lines = [f"{method.name}: {described['kind']}{of}\n\n{text}\n"]
    if method.uses_metric:
        lines.append("With --metric FILE (of starmerge calibrate) it works in whitened inputs.\n")
    for parameter in described["parameters"]:
        default = json.dumps(parameter.get("default"))
        shown = "" if default == "null" else f"={default.strip(chr(34))}"
        allowed = _allowed(parameter)
        about = parameter.get("description", "")
        lines.append(f"-p {parameter['name']}{shown} ({allowed}): {about}")
    return "\n".join(lines)


def print_faults(plugins: Sequence[Plugin[Any]]) -> None:
    """Say on standard error which plug-ins of installed packages cannot be used, and why."""
    for fault in dict.fromkeys(plugin.fault for plugin in plugins):
        if fault is not None:
            emit(Note(fault))


def _allowed(schema: dict[str, Any]) -> str:
    """Say in words which values a JSON schema allows."""
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(_allowed(choice) for choice in schema[key])
    if "enum" in schema:
        return "|".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        return f"a list, each: {_allowed(schema.get('items', {}))}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"a mapping to: {_allowed(values)}" if isinstance(values, dict) else "a mapping"
    word = {"boolean": "true|false", "null": "not set"}.get(schema.get("type", ""), "")
    words = [word or schema.get("type", "any value")]
    for key, sign in _BOUNDS.items():
        if key in schema:
            words.append(f"{sign} {schema[key]:g}")
    return " ".join(words)


_BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
"""What JSON schemas call bounds."""


def _described(method: type[Method]) -> dict[str, Any]:
    from pydantic import TypeAdapter

    from starmerge_models.methods import METHODS

    schema = TypeAdapter(method).json_schema()
    origin = METHODS.origin(method)
    return {
        "name": method.name,
        "kind": method.kind,
        "origin": None if origin is None else origin.record(),
        "description": inspect.cleandoc(method.__doc__ or ""),
        "parameters": [
            {"name": key.rstrip("_"), **{k: v for k, v in entry.items() if k != "title"}}
            for key, entry in _resolved(schema).get("properties", {}).items()
        ],
    }


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema with its definitions in the places that refer to them."""
    definitions = schema.get("$defs", {})

    def inside(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return inside(definitions[part["$ref"].rpartition("/")[2]])
            return {key: inside(value) for key, value in part.items() if key != "$defs"}
        return [inside(item) for item in part] if isinstance(part, list) else part

    resolved: dict[str, Any] = inside(schema)
    return resolved
