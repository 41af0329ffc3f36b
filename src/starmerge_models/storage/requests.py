"""Requests to Amazon S3, Google Cloud Storage and Azure Blob Storage, through obstore.

obstore wraps the Rust library ``object_store``: it reads credentials from the environment, signs
requests, repeats failed requests with exponential backoff, and requests ranges on the condition
that the object has not changed. docs/object-stores.md explains the choice of this library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from datetime import timedelta
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import (
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, ObjectStore, S3Store

from starmerge_models.errors import StarmergeError
from starmerge_models.events import Retry, emit
from starmerge_models.storage.places import RemotePlace
from starmerge_models.storage.ranges import CUT_OFF, changed
from starmerge_models.storage.storage import FileState, ShortFileError

if TYPE_CHECKING:
    from obstore import GetOptions

Answer = TypeVar("Answer")

RETRIES = 8
"""Number of retries of a request."""

FIRST_DELAY = timedelta(milliseconds=100)
"""Delay before the first retry, about; each following delay is doubled, up to 15 seconds."""

TIMEOUT = timedelta(seconds=60)
"""Timeout of one request with its body: 16 MiB take that long at 280 kB/s."""

PATIENCE = timedelta(minutes=3)
"""Time after which a failing request is not retried any more."""

_CUT_OFF = 2
"""Number of retries after a truncated response, which obstore does not retry for lists."""


class ObjectBackend:
    """Client of object stores, with one connection for each bucket, opened on first use.

    Web consoles of stores create a folder as an empty object whose key is the folder's path with a
    slash at the end. obstore lists it without the slash, as a member of the folder itself. It is
    not a file and is left out of the folder's files.
    """

    def store(self, place: RemotePlace) -> ObjectStore:
        """Return the connection to the bucket of a place."""
        return _store(place.scheme, place.root)

    def stat(self, file: RemotePlace) -> FileState:
        """Return size and entity tag of an object."""
        found = _answer(file, lambda: obstore.head(self.store(file), file.path))
        marks = found["e_tag"], found["version"], str(found["last_modified"])
        # Without a tag or a version, a second change within one second may be undetectable.
        settled = marks[0] is not None or marks[1] is not None
        own = [mark for mark in marks[: 2 if settled else 3] if mark is not None]
        return FileState(found["size"], (str(file), found["size"], *own), settled)

    def fetch(self, file: RemotePlace, state: FileState | None, start: int, stop: int) -> Any:
        """Return a range of an object, after checking its tag if ``state`` is given."""
        options: GetOptions = {"range": (start, stop)}
        marks = () if state is None else state.identity[2:]
        tag = next((mark for mark in marks if str(mark).startswith(('"', "W/"))), None)
        if tag is not None:
            options["if_match"] = str(tag)
        content = _answer(
            file, lambda: obstore.get(self.store(file), file.path, options=options).buffer()
        )
        if len(content) != stop - start:
            raise ShortFileError(f"{file} ends early")
        return content

    def members(self, folder: RemotePlace) -> tuple[list[str], list[str]]:
        """Return the names of the objects and of the common prefixes directly below a place."""
        store, path = self.store(folder), folder.path or None
        found = _answer(folder, lambda: obstore.list_with_delimiter(store, path))
        objects = [entry["path"] for entry in found["objects"] if entry["path"] != folder.path]
        files = [key.rpartition("/")[2] for key in objects]
        return files, [prefix.rpartition("/")[2] for prefix in found["common_prefixes"]]

    def tree(self, folder: RemotePlace) -> dict[str, int]:
        """Return the sizes of all objects below a place."""
        begin = len(f"{folder.path}/") if folder.path else 0
        store, path = self.store(folder), folder.path or None
        pages = _answer(folder, lambda: list(obstore.list(store, path)))
        sizes = {own["path"]: own["size"] for page in pages for own in page}
        return {key[begin:]: size for key, size in sizes.items() if key != folder.path}

    def written(self, folder: RemotePlace) -> float:
        """Return the time of the last write below a place, in seconds since the epoch."""
        store, path = self.store(folder), folder.path or None
        pages = _answer(folder, lambda: list(obstore.list(store, path)))
        return max((own["last_modified"].timestamp() for page in pages for own in page), default=0)

    def put(self, file: RemotePlace, content: bytes | bytearray | memoryview) -> None:
        """Write an object in one request."""
        store = self.store(file)
        _answer(file, lambda: obstore.put(store, file.path, content, use_multipart=False))

    def delete(self, folder: RemotePlace, names: Collection[str]) -> None:
        """Delete objects, given by names relative to a folder."""
        store, keys = self.store(folder), [(folder / name).path for name in names]
        if keys:
            _answer(folder, lambda: obstore.delete(store, keys))


@lru_cache(maxsize=64)
def _store(scheme: str, root: str) -> ObjectStore:
    """Open a bucket with the credentials of the environment."""
    options: dict[str, Any] = {
        "client_options": {"timeout": TIMEOUT},
        "retry_config": {
            "max_retries": RETRIES,
            "backoff": {"init_backoff": FIRST_DELAY},
            "retry_timeout": PATIENCE,
        },
    }
    if scheme == "gs":
        return GCSStore(root, **options)
    if scheme == "az":
        return AzureStore(root, **options)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if endpoint.startswith("http://"):
        options["client_options"]["allow_http"] = True
    return S3Store(root, **options, **_profile())


def _profile() -> dict[str, Any]:
    """Return credentials from boto3, if installed, which supports profiles and single sign-on.

    Keys in the environment take precedence. Without boto3, obstore itself finds web identities and
    the roles of containers and machines.
    """
    own = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")
    if any(name in os.environ for name in own) or find_spec("boto3") is None:
        return {}
    import boto3  # noqa: PLC0415  (not needed, used where it is installed)
    from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415

    session = boto3.Session()
    if session.get_credentials() is None:
        return {}
    region = {"region": session.region_name} if session.region_name else {}
    return {"credential_provider": Boto3CredentialProvider(session), **region}


_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_STATUS = re.compile(r"status code: (\d{3}(?: [A-Z][A-Za-z ]{2,30})?)")
_CREDENTIALS = (
    *("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"),
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestExpired", "RequestTimeTooSkewed"),
    *("AuthenticationFailed", "AuthorizationFailure", "InvalidAuthenticationInfo", "AccessDenied"),
)
"""Error codes of S3, Google Cloud Storage and Azure about credentials."""


def _answer(place: RemotePlace, ask: Callable[[], Answer]) -> Answer:
    """Return the response of a store, and retry after truncated responses.

    Raises:
        FileNotFoundError: The object does not exist.
        StarmergeError: The object was replaced, or the store refuses the request or cannot be
            reached.
    """
    for attempt in range(1, _CUT_OFF + 2):
        try:
            return ask()
        except PreconditionError:
            raise changed(place) from None
        except (BaseError, OSError, ValueError) as error:
            if attempt > _CUT_OFF or not _is_cut_off(error):
                raise in_words(place, error) from None
            emit(Retry(str(place), attempt, 0.0, CUT_OFF))
    raise AssertionError


def _is_cut_off(error: Exception) -> bool:
    """Return whether an error is that of a truncated response."""
    text = str(error)
    return "Error performing" not in text and ("body" in text or "incomplete" in text.lower())


def in_words(place: RemotePlace, error: Exception) -> Exception:
    """Convert an error of obstore.

    Only the status and the store's error code are copied from obstore's text, because the rest may
    contain signatures or tokens.
    """
    text = str(error)
    code, status = _CODE.search(text), _STATUS.search(text)
    said = " ".join([*([status[1]] if status else []), *([code[1]] if code else [])])
    if code is not None and code[1] in ("NoSuchBucket", "ContainerNotFound"):
        return StarmergeError(f"{place}: there is no bucket {place.root}. Check the URL.")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{place} is not there")
    if status is not None and status[1].startswith("416"):
        return ShortFileError(f"{place} ends early")
    refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
    # S3 answers an expired token with status 400, and responses to HEAD have no error code.
    refused |= status is not None and status[1].startswith("400") and code is None
    if refused or (code is not None and code[1] in _CREDENTIALS):
        reason = (
            f"the store refuses the credentials of this process ({said or 'no access'}): they are "
            "missing, have expired, are of another region, or do not allow this. Renew them and "
            "run the same command again."
        )
    elif "169.254.169.254" in text or "metadata.google" in text:
        reason = (
            "no credentials were found. Set those of the store in the environment, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    elif said:
        reason = f"the store answers {said}, though it was asked again. Try again later."
    elif "timed out" in text or "timeout" in text.lower():
        reason = "the store did not answer in time, though it was asked again. Try again later."
    else:
        reason = (
            f"the store cannot be reached ({type(error).__name__}). Check the network, the URL and "
            "the endpoint in the environment."
        )
    return StarmergeError(f"{place}: {reason}")
