"""``starmerge schema``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from starmerge_models.cli.importing import importing


def schema(
    name: Annotated[str, typer.Argument(metavar="recipe|task|suite|study", help="Of which file.")],
) -> None:
    """Print the JSON Schema of a kind of file, by which editors check and complete it.

    Example: starmerge schema recipe > recipe.schema.json
    """
    with importing():
        from starmerge_models.schemas import schema_of

    print(json.dumps(schema_of(name), indent=2, ensure_ascii=False))
