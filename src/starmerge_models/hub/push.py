"""Pushing a merge: one commit, in which all of it appears or nothing.

The client's own ways to upload a folder (``upload_folder``, ``upload_large_folder``) may make
several commits of it, so that a repository shows half a model for a while. ``preupload_lfs_files``
sends what is large without a commit, and ``create_commit`` then makes all of it appear: files that
the Hub has are not sent again (with hf_xet: pieces of files), which is what makes a push resumable.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starmerge_models.checkpoints.card import CARD
from starmerge_models.errors import StarmergeError
from starmerge_models.events import Retry, emit
from starmerge_models.hub.merged import Merged, open_merged
from starmerge_models.hub.scores import with_scores
from starmerge_models.hub.talking import may_pass, talking
from starmerge_models.hub.target import MAIN, Held, check_target, files_of, parse_target
from starmerge_models.reading import read_text

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

_WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between two tries of a commit. The client itself tries uploads again."""


@dataclass(frozen=True)
class Pushed:
    """A merge that lies on the Hub."""

    url: str
    """Of the model's page, or of the branch."""
    commit: str
    files: tuple[str, ...]
    """Names of what was pushed."""
    deleted: tuple[str, ...]
    """Names of what belonged to the merge that lay there before, and not to this one."""
    is_new: bool
    """Whether a commit was made; if not, all of it lay there already."""
    replaced: str | None
    """The commit with the merge that lay there before, if it was another."""


def push(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    scores: str | Path | None = None,
    progress: bool = False,
) -> Pushed:
    """Push the folder of a merge to the Hugging Face Hub.

    All of it appears in one commit. What belonged to a merge that lay there before, and not to this
    one, goes in the same commit; files that others added stay. A push that was interrupted is
    resumed by pushing again.

    Args:
        path: The folder.
        repo: ``org/name``, or ``org/name@branch``; both are made if they are not there.
        private: Make the repository private, if it is made.
        message: The commit's; by default it says what was merged.
        scores: A results folder of ``starmerge evaluate``, for the card.
        progress: Show the client's progress bars on standard error.

    Raises:
        UsageError: The folder is no merge; the Hub cannot be asked, the token may not write there,
            or something else lies there.
        StarmergeError: The merge is not whole; the Hub fails, or cannot be reached.

    Example:
        ``sm.push("merged", "my-name/my-merge", private=True)``
    """
    return push_merged(
        open_merged(Path(path)),
        repo,
        private=private,
        message=message,
        scores=None if scores is None else Path(scores),
        progress=progress,
    )


def push_merged(
    merged: Merged,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    scores: Path | None = None,
    progress: bool = False,
) -> Pushed:
    """Push a merge that was found to be whole; see :func:`push`."""
    from huggingface_hub import (  # noqa: PLC0415  (slow to import)
        CommitOperationAdd,
        CommitOperationDelete,
    )

    target = parse_target(repo)
    card = read_text(merged.path / CARD)
    if scores is not None:
        name = target.repo_id.partition("/")[2]
        card = with_scores(card, merged.path, scores, name=name)
    held = check_target(target, private=private)
    api = held.api
    with talking(held.token, target.repo_id, progress=progress):
        parent = held.commit
        if not held.has_repo:
            api.create_repo(target.repo_id, private=private or None, exist_ok=True)
        if not held.has_branch:
            api.create_branch(target.repo_id, branch=target.branch, exist_ok=True)
        if not (held.has_repo and held.has_branch):
            parent = api.model_info(target.repo_id, revision=target.branch).sha
        additions = [
            CommitOperationAdd(name, card.encode() if name == CARD else merged.path / name)
            for name in merged.files
        ]
        deleted = sorted((held.merged & held.files.keys()) - {*merged.files})
        deletions = [CommitOperationDelete(name) for name in deleted]
        commit = _commit(held, additions, deletions, parent, message or _message(merged))
        wrong = _wrong(held, additions, commit)
    if wrong:
        raise StarmergeError(
            f"{target} does not show this merge, though the Hub took it: {wrong[0]} Was it changed "
            "by somebody else meanwhile, or does a .gitignore leave files out?"
        )
    url = f"{api.endpoint}/{target.repo_id}"
    return Pushed(
        url if target.branch == MAIN else f"{url}/tree/{target.branch}",
        commit,
        merged.files,
        tuple(deleted),
        is_new=commit != parent,
        replaced=held.commit if held.merged and commit != parent else None,
    )


def _message(merged: Merged) -> str:
    recipe = merged.report["recipe"]
    return f"Merge of {len(recipe['models'])} models by {recipe['method']}"


def _commit(
    held: Held,
    additions: Sequence[CommitOperationAdd],
    deletions: Sequence[CommitOperationDelete],
    parent: str | None,
    message: str,
) -> str:
    """Upload, commit on top of ``parent``, and return the commit at which the branch is then.

    The Hub refuses a commit if the branch is not at ``parent`` any more, so that one that was made,
    and of which the answer was lost, is not made twice.
    """
    api, repo_id, branch = held.api, held.target.repo_id, held.target.branch
    api.preupload_lfs_files(repo_id, additions, revision=branch, free_memory=False)
    for attempt, wait in enumerate((*_WAITS, None), start=1):
        try:
            if attempt > 1 and api.model_info(repo_id, revision=branch).sha != parent:
                break
            return api.create_commit(
                repo_id,
                [*additions, *deletions],
                commit_message=message,
                revision=branch,
                parent_commit=parent,
            ).oid
        except Exception as error:
            if wait is None or not may_pass(error):
                raise
            emit(Retry(f"the commit to {held.target}", attempt, wait, type(error).__name__))
            time.sleep(wait)
    # The commit was made, and the answer was lost; or somebody else made one.
    return str(api.model_info(repo_id, revision=branch).sha)


def _wrong(held: Held, additions: Sequence[CommitOperationAdd], commit: str) -> list[str]:
    """Return what a commit shows otherwise than it was sent, each in a sentence."""
    files = files_of(held.api, held.target.repo_id, commit)
    wrong = []
    for sent in additions:
        found = files.get(sent.path_in_repo)
        if found is None:
            wrong.append(f"{sent.path_in_repo} is missing.")
        elif found.size != sent.upload_info.size or (
            found.lfs is not None and found.lfs.sha256 != sent.upload_info.sha256.hex()
        ):
            wrong.append(f"{sent.path_in_repo} has other content.")
    return wrong
