"""The model card of a merged model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.models import FineTune
from starmerge_models.checkpoints.stacked import bases_of, parts_of

CARD = "README.md"


def card_of(
    title: str,
    base: Base,
    models: Sequence[FineTune],
    recipe: str,
    summary: str,
    *,
    library: str = "transformers",
    metric: str | None = None,
) -> str:
    """Return the text of ``README.md``, with metadata for the Hub and the recipe of the merge.

    Args:
        title: Name of the merged model.
        base: The base.
        models: The merged models.
        recipe: The recipe in YAML.
        summary: A summary of the result, one or two sentences.
        library: The library that loads the folder.
        metric: Name of the file with the moments of inputs, if the merge used one.
    """
    sources = [own.source for own in bases_of(base)]
    sources += [part.source for model in models for part in parts_of(model)]
    hub_ids = list(dict.fromkeys(source.name for source in sources if source.name))
    data: dict[str, Any] = {"library_name": library, "tags": ["merge", "starmerge"]}
    if hub_ids:
        data = {"base_model": hub_ids, **data, "base_model_relation": "merge"}
    rows = "\n".join(
        f"| {_code(model.name, in_table=True)} | {model.kind} | "
        f"{_code(str(model.source), in_table=True)} |"
        for model in models
    )
    means = f"with the moments of inputs in {_code(metric)}" if metric else "without data"
    root = _code(base.source.name or str(base.source))
    fence = "`" * max(3, _longest_run(recipe) + 1)
    text = "\n\n".join(
        [
            f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---",
            f"# {_plain(title)}",
            f"A merge of {len(models)} fine-tunes of {root}, made by starmerge "
            f"{means} and without training.",
            _plain(summary),
            f"| model | kind | from |\n|---|---|---|\n{rows}",
            "Recipe (`starmerge merge recipe.yaml -o OUT` repeats it):",
            f"{fence}yaml\n{recipe}{fence}",
            "`merge_report.json` says what happened to each tensor.",
        ]
    )
    return text + "\n"


def _code(text: str, *, in_table: bool = False) -> str:
    """Return an untrusted text as Markdown code, in which links and HTML are not interpreted.

    Unprintable characters, such as line breaks, are escaped as in Python. Bars are escaped in
    tables, because GitHub ends a cell at a bar even inside code.
    """
    shown = _printed(text)
    fence = "`" * (_longest_run(shown) + 1)
    if shown.startswith("`") or shown.endswith("`") or not shown.strip():
        shown = f" {shown} "
    return f"{fence}{shown}{fence}".replace("|", r"\|" if in_table else "|")


def _plain(text: str) -> str:
    """Return an untrusted text as Markdown in which links and HTML are escaped."""
    return re.sub(r"([\\`*\[\]<>|&~#!])|(?<=[\w]):(?=//)|(?<=www)\.", r"\\\g<0>", _printed(text))


def _printed(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
