"""The target of a push: a branch of a repository, and its content before the push."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.hub.client_errors import translated_errors
from starmerge_models.reading import read_json
from starmerge_models.storage.publishing import REPORT
from starmerge_models.versions import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

MAIN = "main"
"""The default branch of a repository."""

_TARGET = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<branch>[\w./-]+))?", re.ASCII)

_NO_CONTENT = (".gitattributes", ".gitignore", "README.md", "LICENSE*")
"""Files that the Hub adds to a new repository, or offers to add."""


@dataclass(frozen=True)
class Target:
    """A branch of a Hub repository."""

    repo_id: str
    """``org/name``."""
    branch: str = MAIN

    def __str__(self) -> str:
        return self.repo_id if self.branch == MAIN else f"{self.repo_id}@{self.branch}"


@dataclass(frozen=True)
class TargetState:
    """The state of a target before a push."""

    target: Target
    token: str
    """The token of the push."""
    has_repo: bool
    """Whether the repository exists."""
    has_branch: bool
    files: Mapping[str, RepoFile]
    """The files of the branch, or of the branch that it will be created from, by name."""
    merged: frozenset[str] = frozenset()
    """The files of the previous merge."""
    commit: str | None = None
    """The branch's last commit; None if there is none yet."""

    @property
    def api(self) -> HfApi:
        """The Hub's client, with the token."""
        return client(self.token)

    def __repr__(self) -> str:
        return f"TargetState({self.target})"


def parse_target(text: str) -> Target:
    """Parse ``org/name`` or ``org/name@branch``.

    Raises:
        UsageError: The text has another form, or the Hub does not allow the name.
    """
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415  (slow to import)
    from huggingface_hub.utils import validate_repo_id  # noqa: PLC0415

    found = _TARGET.fullmatch(text)
    if found is None:
        raise UsageError(
            f"{text[:200]!r} is no repository to push to. Give ORG/NAME, such as my-name/my-merge, "
            "or ORG/NAME@BRANCH."
        )
    try:
        validate_repo_id(found["repo"])
    except HFValidationError as error:
        raise UsageError(f"{text!r} is no repository to push to. {error}") from error
    return Target(found["repo"], found["branch"] or MAIN)


def client(token: str) -> HfApi:
    """Return the Hub's client with starmerge's user agent."""
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow to import)

    return HfApi(token=token, library_name="starmerge", library_version=__version__)


def check_target(target: Target, *, private: bool = False) -> TargetState:
    """Make sure that a merge may be pushed to a target; return the target's state.

    The check writes nothing: the push itself creates a missing repository.

    Args:
        target: The target.
        private: Whether the repository must be private.

    Raises:
        UsageError: HF_HUB_OFFLINE is set, there is no token, the token may not write there, or the
            repository has content other than a merge.
        StarmergeError: The Hub fails, or cannot be reached.
    """
    from huggingface_hub import constants, get_token  # noqa: PLC0415  (slow to import)

    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            f"{target} cannot be pushed to: HF_HUB_OFFLINE forbids access to the Hub. Set it to 0."
        )
    token = get_token()
    if token is None:
        raise UsageError(
            f"{target} cannot be pushed to without a token. Log in with `hf auth login`, or set "
            "HF_TOKEN to a token with write access, of https://huggingface.co/settings/tokens."
        )
    api = client(token)
    with translated_errors(token, target.repo_id):
        _check_namespace(target, api.whoami())
        info, has_branch = _info(api, target)
        if info is None:
            return TargetState(
                target, token, has_repo=False, has_branch=target.branch == MAIN, files={}
            )
        if private and not info.private:
            raise UsageError(
                f"{target.repo_id} is on the Hub already, and public. Make it private in its "
                "settings, or push without --private."
            )
        _check_may_write(api, target, has_branch)
        files = files_of(api, target.repo_id, info.sha)
        merged = _merged(api, target, files, info.sha)
    return TargetState(target, token, True, has_branch, files, merged, info.sha)


def files_of(api: HfApi, repo_id: str, commit: str | None) -> dict[str, RepoFile]:
    """Return the files of a commit by name; ``commit`` is None for an empty repository."""
    from huggingface_hub.hf_api import RepoFile  # noqa: PLC0415  (slow to import)

    if commit is None:
        return {}
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _check_namespace(target: Target, who: Mapping[str, Any]) -> None:
    """Make sure that the user owns the repository's namespace or may write to it."""
    org = target.repo_id.partition("/")[0]
    roles = {found.get("name"): found.get("roleInOrg") for found in who.get("orgs") or ()}
    known = [str(who.get("name")), *map(str, roles)]
    if org.lower() not in map(str.lower, known):
        raise UsageError(
            f"The token belongs to {known[0]}, who may not write to {org}. Push to one of: "
            f"{', '.join(known)}."
        )
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read" or roles.get(org) == "read":
        of = "The token" if token.get("role") == "read" else f"{known[0]}'s role in {org}"
        raise UsageError(
            f"{of} only allows reading. Push with a token that has write access, from "
            "https://huggingface.co/settings/tokens."
        )


def _info(api: HfApi, target: Target) -> tuple[ModelInfo | None, bool]:
    """Return the Hub's info on a branch or the default branch; and whether the branch exists."""
    from huggingface_hub.errors import (  # noqa: PLC0415  (slow to import)
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return api.model_info(target.repo_id, revision=target.branch), True
    except RevisionNotFoundError:
        if target.branch == MAIN:
            return api.model_info(target.repo_id), False
        return api.model_info(target.repo_id, revision=MAIN), False
    except RepositoryNotFoundError:
        return None, False


def _check_may_write(api: HfApi, target: Target, has_branch: bool) -> None:
    """Check write access by a request for an upload mode, which the Hub answers only to writers."""
    from huggingface_hub import CommitOperationAdd  # noqa: PLC0415  (slow to import)

    api.preupload_lfs_files(
        target.repo_id,
        [CommitOperationAdd("README.md", b"# May this be written?\n")],
        revision=target.branch if has_branch else MAIN,
    )


def _merged(
    api: HfApi, target: Target, files: Mapping[str, RepoFile], commit: str | None
) -> frozenset[str]:
    """Return the files of the merge in a repository.

    Raises:
        UsageError: The repository has content other than a merge.
    """
    if REPORT in files:
        with tempfile.TemporaryDirectory(prefix="starmerge-push-") as folder:
            found = api.hf_hub_download(target.repo_id, REPORT, revision=commit, local_dir=folder)
            try:
                listed = read_json(Path(found)).get("files")
            except StarmergeError:
                listed = None
        if isinstance(listed, list):
            return frozenset(name for name in listed if isinstance(name, str)) | {REPORT}
    other = [name for name in files if not any(fnmatchcase(name, own) for own in _NO_CONTENT)]
    if other:
        raise UsageError(
            f"{target} has {other[0]} and no {REPORT}, so it is not a merge of starmerge and is "
            "not replaced. Choose another repository or branch, or empty it."
        )
    return frozenset()
