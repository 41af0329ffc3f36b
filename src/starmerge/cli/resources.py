"""Options of the commands that walk over tensors: what they may take of the machine."""

from __future__ import annotations

from typing import Annotated

import typer

Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Tensors to work on at once.",
        show_default="OMP_NUM_THREADS, or all processors",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for tensors in work, such as 4GB; one that needs more is taken alone.",
        show_default="a quarter of the machine's",
    ),
]
