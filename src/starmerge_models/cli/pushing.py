"""Pushing to the Hub, as ``starmerge push`` and the end of ``starmerge merge --push`` do it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starmerge_models.cli.importing import importing
from starmerge_models.errors import Interrupted, StarmergeError, UsageError
from starmerge_models.events import Note, emit

if TYPE_CHECKING:
    from starmerge_models.hub.push import Pushed
    from starmerge_models.recipe_file import Step

Push = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="ORG/NAME[@BRANCH]",
        help="When the folder is complete, push it to this model repository of the Hub, as "
        "[b]starmerge push[/b] does. Token and repository are checked before the merge.",
    ),
]
Private = Annotated[
    bool,
    typer.Option("--private", help="Make the repository private, if it is not there yet."),
]


def check(repo: str | None, step: Step, *, private: bool) -> None:
    """Make sure that a merge can be pushed when it is done.

    Args:
        repo: Where to, as on the command line; None: nowhere.
        step: The merge.
        private: As on the command line.

    Raises:
        UsageError: The output is no folder, or the repository may not be written to.
        StarmergeError: The Hub fails, or cannot be reached.
    """
    if repo is None:
        if private:
            raise UsageError("--private is for a push: give --push ORG/NAME, too.")
        return
    with importing():
        from starmerge_models.hub.target import check_target, parse_target
        from starmerge_models.merging.outputs import is_output_file

    target = parse_target(repo)
    folder = step.output
    if not isinstance(folder, Path):
        raise UsageError(
            f"{folder} is a URL, and folders of this machine are pushed. Give a folder as OUTPUT."
        )
    if is_output_file(step.recipe, folder):
        raise UsageError(
            f"{folder} is one file, without a card and a report, and folders are pushed. Give "
            "a folder as OUTPUT: the file comes to lie in it, with both."
        )
    check_target(target, private=private)


def is_made(step: Step) -> bool:
    """Tell whether the output exists, complete, and is of this very merge."""
    from starmerge_models.merging.plan import make_plan
    from starmerge_models.merging.steps import is_up_to_date
    from starmerge_models.storage import exists
    from starmerge_models.storage.publishing import REPORT

    if not all(map(exists, (step.output / REPORT, *step.needs))):
        return False
    return is_up_to_date(make_plan(step.recipe, step.output, writes=False), progress=True)


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool,
    message: str | None = None,
    scores: Path | None = None,
    is_merged_now: bool = False,
) -> Pushed:
    """Push a folder.

    Args:
        folder: The folder.
        repo: As on the command line.
        private: As on the command line.
        message: As on the command line.
        scores: As on the command line.
        is_merged_now: Whether this run has made the folder, so that what fails is but its end.

    Raises:
        StarmergeError: The push failed; says how to go on, if the merge is done.
    """
    with importing():
        from starmerge_models.hub.merged import open_merged
        from starmerge_models.hub.push import push_merged

    merged = open_merged(folder)
    if merged.local_inputs:
        names = ", ".join(merged.local_inputs)
        emit(
            Note(
                f"card and report name folders of this machine, and are pushed as they are: "
                f"{names}. Merges of relative paths or Hub ids name none."
            )
        )
    if merged.others:
        emit(Note(f"not pushed, as the merge did not write it: {', '.join(merged.others)}"))
    again = ["starmerge", "push", str(folder), repo, *(["--private"] if private else [])]
    go_on = f"{folder} is complete. To go on with the push: {shlex.join(again)}"
    try:
        pushed = push_merged(
            merged, repo, private=private, message=message, scores=scores, progress=True
        )
    except StarmergeError as error:
        if not is_merged_now:
            raise
        raise type(error)(f"{error}\n{go_on}") from error
    except Interrupted:
        print(go_on if is_merged_now else "To go on, push again.", file=sys.stderr)
        raise
    return pushed


def lines_on(pushed: Pushed) -> list[str]:
    """Return lines for people on what a push did."""
    lines = []
    if pushed.replaced is not None:
        lines.append(f"The merge that was there before is in the history, at {pushed.replaced}.")
    if pushed.deleted:
        lines.append(f"Deleted with it: {', '.join(pushed.deleted)}")
    done = "Pushed" if pushed.is_new else "There already"
    size = f"{len(pushed.files)} files, commit {pushed.commit[:12]}"
    return [*lines, f"{done}: {pushed.url} ({size})"]
