"""``starmerge schema``."""

from __future__ import annotations

from typing import Annotated

import typer

from starmerge_models.cli.importing import importing
from starmerge_models.cli.printing import Printer


def schema(
    name: Annotated[str, typer.Argument(metavar="recipe|task|suite|study", help="Of which file.")],
) -> None:
    """Print the JSON Schema of a kind of file, by which editors check and complete it.

    Example: starmerge schema recipe > recipe.schema.json
    """
    with importing():
        from starmerge_models.schemas import schema_of

    Printer(as_json=True).result(schema_of(name))
