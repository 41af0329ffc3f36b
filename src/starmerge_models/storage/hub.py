"""Repositories of the Hugging Face Hub, read by range: ``hf://org/name@revision/folder``.

Requests are those of huggingface_hub's file system, with its endpoint, token and retries. A place
that is read names a commit, so its files cannot change.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.events import Retry, emit
from starmerge_models.storage.local_folder import LocalFolder
from starmerge_models.storage.places import RemotePlace, without_secrets
from starmerge_models.storage.ranges import CUT_OFF, Ranges
from starmerge_models.storage.storage import Distribute, FileState, PartialOutput, ShortFileError

_TRUNCATED = 3
"""Number of retries of a range whose response was truncated."""


class HubBackend:
    """Requests to the Hub."""

    @cached_property
    def _system(self) -> Any:
        from huggingface_hub import HfFileSystem  # noqa: PLC0415  (slow to import)

        return HfFileSystem()

    def pinned(self, place: RemotePlace) -> tuple[RemotePlace, str, str]:
        """Return a place with its revision resolved to a commit, the repository and the commit."""
        try:
            found = self._system.resolve_path(str(place))
            if found.repo_type != "model":
                raise UsageError(f"{place} is a {found.repo_type}, and models are read.")
            info = self._system._api.repo_info(found.repo_id, revision=found.revision)
        except UsageError:
            raise
        except FileNotFoundError:
            raise StarmergeError(
                f"{place}: the Hub has no such repository or revision, or this user may not see "
                "it. Check the URL, and log in (hf auth login, HF_TOKEN) if it is private."
            ) from None
        except Exception as error:
            raise _in_words(place, error) from None
        root = f"{found.repo_id}@{info.sha}"
        return RemotePlace("hf", root, found.path_in_repo.strip("/")), found.repo_id, info.sha

    def stat(self, file: RemotePlace) -> FileState:
        """Return size and blob of a file."""
        try:
            found = self._system.info(str(file))
        except Exception as error:
            raise _in_words(file, error) from None
        if found["type"] != "file":
            raise FileNotFoundError(f"{file} is a folder")
        return FileState(found["size"], (str(file), found["size"], found["blob_id"]), True)

    def fetch(self, file: RemotePlace, state: FileState, start: int, stop: int) -> bytes:
        """Return a range of a file."""
        for attempt in range(1, _TRUNCATED + 2):
            try:
                with self._system.open(str(file), "rb", cache_type="none") as stream:
                    stream.seek(start)
                    content: bytes = stream.read(stop - start)
            except Exception as error:
                raise _in_words(file, error) from None
            if len(content) == stop - start:
                return content
            if attempt <= _TRUNCATED:
                emit(Retry(str(file), attempt, 0.0, CUT_OFF))
        raise ShortFileError(f"{file} ends early")

    def members(self, folder: RemotePlace) -> tuple[list[str], list[str]]:
        """Return the names of a folder's files, and of its folders."""
        try:
            found = self._system.ls(str(folder), detail=True)
        except FileNotFoundError:
            return [], []
        except Exception as error:
            raise _in_words(folder, error) from None
        own = [(entry["name"].rpartition("/")[2], entry["type"] == "file") for entry in found]
        if own == [(folder.name, True)]:  # the file itself
            return [], []
        return [n for n, is_file in own if is_file], [n for n, is_file in own if not is_file]

    def tree(self, folder: RemotePlace) -> dict[str, int]:
        """Return the sizes of all files in a folder and its folders."""
        try:
            found = self._system.find(str(folder), detail=True)
        except Exception as error:
            raise _in_words(folder, error) from None
        begin = len(str(folder).removeprefix("hf://")) + 1
        return {name[begin:]: entry["size"] for name, entry in found.items()}


def pinned(place: RemotePlace) -> tuple[RemotePlace, str, str]:
    """Return a place with its revision resolved to a commit, the repository and the commit.

    Raises:
        UsageError: The repository is not a model.
        StarmergeError: The repository or revision does not exist, or the Hub cannot be reached.
    """
    return HubBackend().pinned(place)


class HubStorage(Ranges):
    """The Hub as a read-only storage."""

    def __init__(self) -> None:
        super().__init__(HubBackend())

    def check_output(self, place: RemotePlace, *, overwrite: bool, is_file: bool = False) -> None:
        """Raise UsageError: merges cannot be written to a repository directly."""
        raise UsageError(f"{place}: a merge is not written to hf:// URLs. Give a folder.")

    def check_free_space(
        self,
        folder: RemotePlace,
        wanted: int,
        *,
        suffix: str | None = None,
        is_shared: bool = False,
    ) -> None:
        """Do nothing: nothing is written."""

    def describe_leftovers(self, folder: RemotePlace, *, suffix: str) -> list[str]:
        """Return nothing: nothing is written."""
        return []

    def leftovers(self, output: RemotePlace) -> list[PartialOutput]:
        """Return nothing: nothing is written."""
        return []

    def delete_partial(self, folder: RemotePlace, *, suffix: str) -> None:
        """Do nothing: nothing is written."""

    def publish(
        self,
        place: RemotePlace,
        *,
        overwrite: bool,
        suffix: str,
        member: str | None = None,
        progress: bool = False,
        distribute: Distribute | None = None,
    ) -> AbstractContextManager[LocalFolder]:
        """Raise UsageError; see :meth:`check_output`."""
        raise UsageError(f"{place}: a merge is not written to hf:// URLs. Give a folder.")


def _in_words(place: RemotePlace, error: Exception) -> Exception:
    """Convert an error of huggingface_hub, without any tokens that its text may contain."""
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FileNotFoundError) and status is None:
        return FileNotFoundError(f"{place} is not there")
    if isinstance(error, OfflineModeIsEnabled):
        reason = "it is on the Hub, and HF_HUB_OFFLINE says not to ask there."
    elif isinstance(error, GatedRepoError):
        reason = "it is gated. Ask for access on its page, and log in (hf auth login, HF_TOKEN)."
    elif isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        reason = (
            "the Hub has no such repository or revision, or this user may not see it. Check the "
            "URL, and log in (hf auth login, HF_TOKEN) if it is private."
        )
    elif status in (401, 403):
        reason = f"the Hub refuses the token of this process ({status}). Log in again (HF_TOKEN)."
    elif isinstance(error, HfHubHTTPError) and status is not None:
        reason = f"the Hub answers {status}. Try again later."
    else:
        said = without_secrets(str(error).partition("\n")[0][:200])
        reason = f"the Hub cannot be reached ({said or type(error).__name__})."
    return StarmergeError(f"{place}: {reason}")
