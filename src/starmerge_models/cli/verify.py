"""``starmerge verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from starmerge_models.cli import resources
from starmerge_models.cli.importing import importing
from starmerge_models.cli.printing import AsJson, Printer


def verify(
    path: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that a merge wrote.")],
    repeat: Annotated[
        Literal["none", "sample", "all"],
        typer.Option(
            "--repeat",
            help="Merge again and compare the bytes: of a sample of the tensors, or of all. An "
            "adapter is merged whole for either.",
        ),
    ] = "none",
    inputs: Annotated[
        bool, typer.Option("--inputs/--no-inputs", help="Hash the input files, too.")
    ] = True,
    as_json: AsJson = False,
    threads: resources.Threads = None,
    memory: resources.Memory = None,
) -> None:
    """Check that a merged folder is what its report says, byte by byte.

    Compares every tensor and every file but the card with the hash in merge_report.json, the input
    files with theirs where they are still there, and, if asked, the merge itself. Exits with 1 if
    something is otherwise. Inputs that were given by a relative path are looked for from here.

    Example: starmerge verify merged --repeat sample
    """
    with importing():
        from starmerge_models.merging.verify import verify as check

    verdict = check(
        path, inputs=inputs, repeat=repeat, threads=threads, memory=memory, progress=True
    )
    if as_json:
        Printer(as_json).result(verdict.to_dict())
    else:
        for line in verdict.wrong:
            print(f"Wrong: {line}")
        for name, state in verdict.inputs.items():
            if state != "same":
                print(f"Input {state}: {name}")
        for name in verdict.unlisted:
            print(f"Not in the report: {name}")
        for tensor in verdict.different:
            print(f"Merged again, {tensor} comes out otherwise.")
        if verdict.not_repeated is not None:
            print(f"Not merged again: {verdict.not_repeated}")
        parts = [f"{verdict.tensors} tensors compared with the report"]
        if verdict.inputs:
            parts.append(f"{len(verdict.inputs)} input files")
        if verdict.repeated:
            parts.append(f"{verdict.repeated} tensors merged again")
        judged = "as its report says" if verdict.is_right else "NOT as its report says"
        print(f"{verdict.path} is {judged} ({', '.join(parts)}).")
    raise typer.Exit(0 if verdict.is_right else 1)
