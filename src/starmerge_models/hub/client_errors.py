"""Errors and logs of the Hub's client: translation, transience, redaction of secrets.

Secrets are the token, and the Hub's upload URLs, whose signed queries allow anyone to write there
for a while. The client's errors and warnings quote such URLs, and a server's response may quote
anything.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from starmerge_models.errors import StarmergeError, UsageError

_TOKENS_PAGE = "https://huggingface.co/settings/tokens"

_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which a retry of the request may succeed."""

_HTTP_LIBRARIES = frozenset({"httpx", "httpx2", "httpcore", "requests", "urllib3"})
"""HTTP libraries of different versions of the client; their errors without a status are network
errors."""

_QUERY = re.compile(r"(\bhttps?://[^\s?'\"<>]+)\?[^\s'\"<>)\]]+", re.IGNORECASE)
_LOGIN = re.compile(r"(\bhttps?://)[^\s/@'\"]+@", re.IGNORECASE)
_TOKEN = re.compile(r"\b(hf_|Bearer\s+)\w[\w.+/=-]{7,}")


def without_secrets(text: str, token: str) -> str:
    """Redact tokens, and passwords and queries of URLs, in a text.

    Args:
        text: The text.
        token: The token of this run, in any format.
    """
    text = text.replace(token, "[token]") if token else text
    text = _TOKEN.sub(r"\1[token]", text)
    return _QUERY.sub(r"\1?[…]", _LOGIN.sub(r"\1[…]@", text))


def status_of(error: BaseException) -> int | None:
    """Return the status of the HTTP response of an error or of its causes."""
    return _answer(error)[0]


def is_transient(error: BaseException) -> bool:
    """Return whether an error is transient: the server or the network failed."""
    status = status_of(error)
    return status in _TRANSIENT if status is not None else _is_of_network(error)


@contextmanager
def translated_errors(token: str, repo: str, *, progress: bool = False) -> Iterator[None]:
    """Convert the client's exceptions into errors of this project, without secrets.

    ``--debug`` also shows the client's traceback, redacted, as the error's cause.

    Args:
        token: The token of this run.
        repo: The repository, for messages.
        progress: Show the client's progress bars, if standard error is a terminal.

    Raises:
        UsageError: The Hub rejects the token, or forbids it to write.
        StarmergeError: The Hub refuses for another reason, fails, or cannot be reached.
    """
    with _bars(shown=progress and sys.stderr.isatty()), _log_without_secrets(token):
        try:
            yield
        except StarmergeError:
            raise
        except Exception as error:
            shown = "".join(traceback.format_exception(error))
            # As the cause or context, the original error would be printed with its secrets.
            raise _as_starmerge_error(error, token, repo) from _ClientError(
                without_secrets(shown, token)
            )


class _ClientError(Exception):
    """The redacted traceback of an error of the Hub's client."""


def _as_starmerge_error(error: Exception, token: str, repo: str) -> StarmergeError:
    status, address = _answer(error)
    said = " ".join(without_secrets(str(error) or type(error).__name__, token).split())
    if said and said[-1] not in ".!?":
        said += "."
    kind: type[StarmergeError] = StarmergeError
    if status == 401:
        kind = UsageError
        text = (
            "The Hub rejects the token as invalid. Log in again with `hf auth login`, or set "
            f"HF_TOKEN to a token from {_TOKENS_PAGE}."
        )
    elif status == 403 and "signature=" in address.lower():
        text = (
            "The Hub's storage refused an upload, probably because the upload URL has expired. "
            "Push again to get a new one."
        )
    elif status == 403:
        kind = UsageError
        text = (
            f"The token may not write to {repo} on the Hub. Give it write access, or choose "
            f"another repository; see {_TOKENS_PAGE}."
        )
    elif status in (409, 412):
        text = (
            f"Somebody else has changed {repo} meanwhile, and nothing was committed. Check it, "
            "and push again."
        )
    elif status is not None and is_transient(error):
        text = f"The Hub fails with status {status}; push again later."
    elif status is None and _is_of_network(error):
        text = (
            "The Hub cannot be reached, or the connection to it broke. Check the network, and "
            "push again."
        )
    else:
        return StarmergeError(f"{repo} was not pushed: {said}")
    return kind(f"{text} ({said})")


def _answer(error: BaseException) -> tuple[int | None, str]:
    """Return the status of an error's HTTP response, and its URL."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            return status, str(getattr(response, "url", ""))
    return None, ""


def _is_of_network(error: BaseException) -> bool:
    return any(
        isinstance(link, ConnectionError | TimeoutError)
        or type(link).__module__.partition(".")[0] in _HTTP_LIBRARIES
        for link in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


class _Redaction(logging.Filter):
    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        clean = without_secrets(text, self._token)
        if clean != text:  # structured events without secrets are kept
            record.msg, record.args = clean, None
        return True


@contextmanager
def _log_without_secrets(token: str) -> Iterator[None]:
    """Redact the log records of the client and its HTTP library, for all handlers."""
    names = ("huggingface_hub", *_HTTP_LIBRARIES)
    handlers = {
        *logging.getLogger().handlers,
        *(handler for name in names for handler in logging.getLogger(name).handlers),
    }
    redaction = _Redaction(token)
    for handler in handlers:
        handler.addFilter(redaction)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(redaction)


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Show the client's progress bars, or hide them."""
    from huggingface_hub.utils import (  # noqa: PLC0415  (slow to import)
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
