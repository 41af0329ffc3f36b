"""The model card of a merged model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from starmerge.checkpoints.base import Base
from starmerge.checkpoints.models import FineTune


def write_card(
    path: Path,
    title: str,
    base: Base,
    models: Sequence[FineTune],
    recipe: str,
    summary: str,
    *,
    library: str = "transformers",
    metric: str | None = None,
) -> None:
    """Write ``README.md`` with the metadata the Hub reads and the recipe that repeats the merge.

    Args:
        path: The file to write.
        title: Name of the merged model.
        base: The base.
        models: What was merged.
        recipe: The recipe in YAML.
        summary: What came out, in a sentence or two.
        library: What loads the folder.
        metric: Name of the file with the moments of inputs, if the merge had one.
    """
    hub_ids = [source.name for source in (base.source, *(m.source for m in models)) if source.name]
    data: dict[str, Any] = {"library_name": library, "tags": ["merge", "starmerge"]}
    if hub_ids:
        data = {"base_model": hub_ids, **data, "base_model_relation": "merge"}
    rows = "\n".join(f"| {model.name} | {model.kind} | `{model.source}` |" for model in models)
    means = f"with the moments of inputs in `{metric}`" if metric else "without data"
    text = "\n\n".join(
        [
            f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---",
            f"# {title}",
            f"A merge of {len(models)} fine-tunes of `{base.source.name or base.source}`, made "
            f"by starmerge {means} and without training.",
            summary,
            f"| model | kind | from |\n|---|---|---|\n{rows}",
            f"Recipe (`starmerge merge recipe.yaml -o OUT` repeats it):\n\n```yaml\n{recipe}```",
            "`merge_report.json` says what happened to each tensor.",
        ]
    )
    path.write_text(text + "\n", encoding="utf-8")
