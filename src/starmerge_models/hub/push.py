"""Pushes a merge in one atomic commit.

The client's functions for folders (``upload_folder``, ``upload_large_folder``) may make several
commits, so that a repository temporarily has an incomplete model. ``preupload_lfs_files`` uploads
large files without a commit, and ``create_commit`` then commits all files at once. Files that the
Hub already has (with hf_xet: chunks of files) are not sent again, so a push is resumable.
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
from starmerge_models.hub.client_errors import is_transient, translated_errors
from starmerge_models.hub.merged import MergedFolder, open_merged
from starmerge_models.hub.scores import with_scores
from starmerge_models.hub.target import MAIN, TargetState, check_target, files_of, parse_target
from starmerge_models.reading import read_text

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

_WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts of a commit. The client itself retries uploads."""


@dataclass(frozen=True)
class Pushed:
    """A merge on the Hub."""

    url: str
    """URL of the model's page, or of the branch."""
    commit: str
    files: tuple[str, ...]
    """Names of the pushed files."""
    deleted: tuple[str, ...]
    """Names of files of the previous merge that are not in this one."""
    is_new: bool
    """Whether there was a commit; if not, the branch already had exactly this merge."""
    replaced: str | None
    """The commit of the previous merge, if it was a different one."""


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

    All files are pushed in one commit, which also deletes the files of a previous merge that are
    not in this one; files that others added are kept. To resume an interrupted push, push again.

    Args:
        path: The folder.
        repo: ``org/name``, or ``org/name@branch``; both are created if they do not exist.
        private: Create a new repository as private.
        message: The commit message; by default it describes the merge.
        scores: A results folder of ``starmerge evaluate``, for the card.
        progress: Show the client's progress bars on standard error.

    Raises:
        UsageError: The folder is not a merge; the Hub is offline by configuration; the token may
            not write there; or the repository has other content.
        StarmergeError: The merge is incomplete; the Hub fails, or cannot be reached.

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
    merged: MergedFolder,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    scores: Path | None = None,
    progress: bool = False,
) -> Pushed:
    """Push a merge that was checked by :func:`open_merged`; see :func:`push`."""
    from huggingface_hub import (  # noqa: PLC0415  (slow to import)
        CommitOperationAdd,
        CommitOperationDelete,
    )

    target = parse_target(repo)
    card = read_text(merged.path / CARD)
    if scores is not None:
        name = target.repo_id.partition("/")[2]
        card = with_scores(card, merged.path, scores, name=name)
    state = check_target(target, private=private)
    api = state.api
    with translated_errors(state.token, target.repo_id, progress=progress):
        parent = state.commit
        if not state.has_repo:
            api.create_repo(target.repo_id, private=private or None, exist_ok=True)
        if not state.has_branch:
            api.create_branch(target.repo_id, branch=target.branch, exist_ok=True)
        if not (state.has_repo and state.has_branch):
            parent = api.model_info(target.repo_id, revision=target.branch).sha
        additions = [
            CommitOperationAdd(name, card.encode() if name == CARD else merged.path / name)
            for name in merged.files
        ]
        deleted = sorted((state.merged & state.files.keys()) - {*merged.files})
        deletions = [CommitOperationDelete(name) for name in deleted]
        commit = _commit(state, additions, deletions, parent, message or _message(merged))
        wrong = _mismatches(state, additions, commit)
    if wrong:
        raise StarmergeError(
            f"{target} does not have this merge, although the Hub accepted it: {wrong[0]} Did "
            "somebody else change it meanwhile, or does a .gitignore exclude files?"
        )
    url = f"{api.endpoint}/{target.repo_id}"
    return Pushed(
        url if target.branch == MAIN else f"{url}/tree/{target.branch}",
        commit,
        merged.files,
        tuple(deleted),
        is_new=commit != parent,
        replaced=state.commit if state.merged and commit != parent else None,
    )


def _message(merged: MergedFolder) -> str:
    recipe = merged.report["recipe"]
    return f"Merge of {len(recipe['models'])} models by {recipe['method']}"


def _commit(
    state: TargetState,
    additions: Sequence[CommitOperationAdd],
    deletions: Sequence[CommitOperationDelete],
    parent: str | None,
    message: str,
) -> str:
    """Upload, commit on top of ``parent``, and return the branch's last commit afterwards.

    The Hub refuses a commit if the branch is no longer at ``parent``, so a commit whose response
    was lost is not repeated.
    """
    api, repo_id, branch = state.api, state.target.repo_id, state.target.branch
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
            if wait is None or not is_transient(error):
                raise
            emit(Retry(f"the commit to {state.target}", attempt, wait, type(error).__name__))
            time.sleep(wait)
    # The commit succeeded and its response was lost, or somebody else has committed.
    return str(api.model_info(repo_id, revision=branch).sha)


def _mismatches(
    state: TargetState, additions: Sequence[CommitOperationAdd], commit: str
) -> list[str]:
    """Return a sentence for each file of a commit that differs from the sent one."""
    files = files_of(state.api, state.target.repo_id, commit)
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
