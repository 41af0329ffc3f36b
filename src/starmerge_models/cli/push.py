"""``starmerge push``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from starmerge_models.cli import pushing
from starmerge_models.cli.printing import AsJson, Printer


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that a merge wrote, whole.")
    ],
    repo: Annotated[
        str,
        typer.Argument(
            metavar="ORG/NAME[@BRANCH]",
            help="A model repository of the Hub; it and the branch are made if they are not there.",
        ),
    ],
    private: pushing.Private = False,
    message: Annotated[
        str | None,
        typer.Option(
            "--message", help="The commit's message.", show_default="what was merged, and how"
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="RESULTS",
            help="What [b]starmerge evaluate -o[/b] wrote of this merge: the card gets its scores.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Push a merged folder to the Hugging Face Hub, with its card and report, in one commit.

    Folder, token and repository are checked first. The token is that of hf auth login or of
    HF_TOKEN, and must have write access. What the Hub has already is not sent again: a push that
    was interrupted goes on when it is run again. Files of a merge
    that was there before are deleted; its commit stays in the history. A repository that holds
    something else is not touched.

    Example: starmerge push merged my-name/my-merge --private

    Example: starmerge push merged my-org/my-merge@v2 --scores scores
    """
    printer = Printer(as_json)
    pushed = pushing.upload(folder, repo, private=private, message=message, scores=scores)
    printer.result(asdict(pushed))
    printer.text(*pushing.lines_on(pushed))
