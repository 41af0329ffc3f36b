"""What the manual takes from the source: commands, parameters of methods, JSON schemas.

The commands are written here, since Sphinx's extensions for command lines read click's commands,
and typer 0.29 has commands of its own.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import typer
from docutils import nodes
from pydantic import TypeAdapter
from sphinx.application import Sphinx

from starmerge_models.cli import app as commands
from starmerge_models.methods import Method
from starmerge_models.schemas import SCHEMAS, schema_of

COMMANDS = "<!-- every command -->"
"""What stands in a page where the commands are to be described."""


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of it."""
    app.connect("source-read", _describe_commands)
    app.connect("autodoc-process-docstring", _keep, priority=400)
    app.connect("autodoc-process-docstring", _give, priority=600)
    app.connect("autodoc-process-docstring", _describe_parameters)
    app.connect("autodoc-process-signature", _shorten_signature)
    app.connect("missing-reference", _find_public)
    app.connect("build-finished", _write_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def command_reference() -> str:
    """Return a section for each command, in Markdown."""
    group: Any = typer.main.get_command(commands)
    context = group.make_context("starmerge", [], resilient_parsing=True)
    parts = [
        "## Options of all commands\n",
        "They may stand before or after the command.\n",
        _options(group, context),
        _markdown(group.epilog),
    ]
    for name, command in group.commands.items():
        parts += _command(name, command, context)
    return "\n\n".join(part for part in parts if part) + "\n"


def _command(name: str, command: Any, parent: Any) -> list[str]:
    context = command.make_context(name, [], parent=parent, resilient_parsing=True)
    inner = getattr(command, "commands", {})
    paragraphs = (command.help or "").split("\n\n")
    examples = [text.removeprefix("Example: ") for text in paragraphs if _is_example(text)]
    usage = command.get_usage(context).removeprefix("Usage: ")
    parts = [f"## {context.command_path}", f"```text\n{' '.join(usage.split())}\n```"]
    parts += [_markdown(text) for text in paragraphs if not _is_example(text)]
    if examples:
        parts.append("```bash\n" + "\n".join(examples) + "\n```")
    if not inner:
        parts.append(_options(command, context))
    for key, one in inner.items():
        parts += _command(key, one, context)
    return parts


def _is_example(text: str) -> bool:
    return text.startswith("Example: ")


def _options(command: Any, context: Any) -> str:
    """Return a command's arguments and options as a list of definitions."""
    lines = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in record[0]:
            lines.append(f"`{record[0]}`\n: {_markdown(record[1])}\n")
    return "\n".join(lines)


def _markdown(text: str | None) -> str:
    """Return text with the terminal's markup in Markdown."""
    parts = re.split(r"\[/?b\]", text or "")
    return "**".join(re.sub(r"([<>*_`\[\]])", r"\\\1", part.replace("\\[", "[")) for part in parts)


def _describe_commands(app: Sphinx, page: str, source: list[str]) -> None:
    if COMMANDS in source[0]:
        source[0] = source[0].replace(COMMANDS, command_reference())


def _keep(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Leave what is no markup here: norms in bars; what an attribute is stays for :func:`_give`."""
    lines[:] = [re.sub(r"(``.*?``)|[|]", lambda bar: bar[1] or r"\|", line) for line in lines]
    _kept[name] = list(lines)


def _give(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Give an attribute's text back, whose beginning napoleon has taken for a type."""
    kept = _kept.pop(name)
    if what in ("attribute", "property"):
        lines[:] = kept


_kept: dict[str, list[str]] = {}
"""Docstrings by name, while napoleon works on them."""


def _is_method(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and bool(vars(value).get("name"))


def _describe_parameters(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Add to a method's docstring what its fields say, and how a chain calls it."""
    if not _is_method(value):
        return
    lines[:0] = [f"``{value.name}``, a {value.kind}.", ""]
    fields = TypeAdapter(value).json_schema().get("properties", {})
    if fields:
        lines.append("")
    for field, schema in fields.items():
        about = re.sub(r"([*_`|\\])", r"\\\1", schema.get("description", ""))
        default = json.dumps(schema.get("default"))
        lines.append(f":param {field}: {about} (default ``{default}``)")


def _shorten_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Give a method's parameters without their types, which hold what its fields say."""
    if not _is_method(value):
        return None
    names = ", ".join(value.parameter_names().values())
    return f"(*, {names})" if names else "()", returns


def _find_public(app: Sphinx, env: Any, node: Any, contents: nodes.Node) -> nodes.Node | None:
    """Resolve a reference to where something lives to where the manual describes it."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].rpartition(".")[2]
    for public in (f"starmerge_models.{name}", f"starmerge_models.methods.{name}"):
        if public != node["reftarget"]:
            found = env.get_domain("py").find_obj(env, None, None, public, None)
            if found:
                _, entry = found[0]
                return app.builder and _link(app, node, entry, contents)
    return None


def _link(app: Sphinx, node: Any, entry: Any, contents: nodes.Node) -> nodes.Node:
    uri = app.builder.get_relative_uri(node["refdoc"], entry.docname) + "#" + entry.node_id
    return nodes.reference("", "", contents, internal=True, refuri=uri)


def _write_files(app: Sphinx, error: Exception | None) -> None:
    """Put the schemas, and pages that are whole by themselves, beside the manual's."""
    if error is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    shutil.copytree(Path(app.srcdir) / "pages", out / "pages", dirs_exist_ok=True)
    (out / "schemas").mkdir(exist_ok=True)
    for name in SCHEMAS:
        text = json.dumps(schema_of(name), indent=2, ensure_ascii=False)
        (out / "schemas" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
