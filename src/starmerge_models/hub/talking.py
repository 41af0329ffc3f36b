"""Calls of the Hub's client: what may pass, what a failure means, and no secret in either.

Secrets are the token, and the addresses that the Hub gives out for uploads, whose queries are
signed: whoever has one may write there for a while. The client's errors and warnings quote such
addresses, and a server's answer may quote anything.
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

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""

_HTTP_LIBRARIES = frozenset({"httpx", "httpx2", "httpcore", "requests", "urllib3"})
"""What versions of the client send requests with; their errors without a status are the network's.
"""

_QUERY = re.compile(r"(\bhttps?://[^\s?'\"<>]+)\?[^\s'\"<>)\]]+", re.IGNORECASE)
_LOGIN = re.compile(r"(\bhttps?://)[^\s/@'\"]+@", re.IGNORECASE)
_TOKEN = re.compile(r"\b(hf_|Bearer\s+)\w[\w.+/=-]{7,}")


def without_secrets(text: str, token: str) -> str:
    """Return a text without tokens, without passwords in addresses, and without their queries.

    Args:
        text: The text.
        token: The token of this run, whatever it looks like.
    """
    text = text.replace(token, "[token]") if token else text
    text = _TOKEN.sub(r"\1[token]", text)
    return _QUERY.sub(r"\1?[…]", _LOGIN.sub(r"\1[…]@", text))


def status_of(error: BaseException) -> int | None:
    """Return the status of the HTTP response that an error, or one behind it, speaks of."""
    return _answer(error)[0]


def may_pass(error: BaseException) -> bool:
    """Tell whether the same request may succeed later: the server or the network failed."""
    status = status_of(error)
    return status in _PASSING if status is not None else _is_of_network(error)


@contextmanager
def talking(token: str, repo: str, *, progress: bool = False) -> Iterator[None]:
    """Turn what the Hub's client raises into errors of this project, which quote no secrets.

    ``--debug`` shows the client's traceback too, in the text of the error's cause.

    Args:
        token: The token of this run.
        repo: The repository that is spoken of.
        progress: Let the client show its progress bars, where standard error is a terminal.

    Raises:
        UsageError: The Hub takes the token for invalid, or forbids it to write.
        StarmergeError: The Hub refuses for another reason, fails, or cannot be reached.
    """
    with _bars(shown=progress and sys.stderr.isatty()), _log_without_secrets(token):
        try:
            yield
        except StarmergeError:
            raise
        except Exception as error:
            shown = "".join(traceback.format_exception(error))
            # The error itself, with its text, would be printed if it were the cause or the context.
            raise _told(error, token, repo) from _ClientError(without_secrets(shown, token))


class _ClientError(Exception):
    """An error of the Hub's client: its traceback, without secrets."""


def _told(error: Exception, token: str, repo: str) -> StarmergeError:
    status, address = _answer(error)
    said = " ".join(without_secrets(str(error) or type(error).__name__, token).split())
    if said and said[-1] not in ".!?":
        said += "."
    kind: type[StarmergeError] = StarmergeError
    if status == 401:
        kind = UsageError
        text = (
            "The Hub takes the token for invalid. Log in again with `hf auth login`, or set "
            f"HF_TOKEN to a token of {_TOKENS_PAGE}."
        )
    elif status == 403 and "signature=" in address.lower():
        text = (
            "The Hub's storage refused an upload, most likely because the address that the Hub "
            "gave out for it has expired. Push again, for a new one."
        )
    elif status == 403:
        kind = UsageError
        text = (
            f"The token may not write to {repo} on the Hub. Give it write access, or choose "
            f"another repository; see {_TOKENS_PAGE}."
        )
    elif status in (409, 412):
        text = (
            f"{repo} has been changed by somebody else meanwhile, and nothing was committed. Look "
            "at it, and push again."
        )
    elif status is not None and may_pass(error):
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
    """Return the status of the HTTP response that an error comes from, and whose answer it is."""
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
    """Yield an error and those that it came from."""
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
        if clean != text:  # events stay events
            record.msg, record.args = clean, None
        return True


@contextmanager
def _log_without_secrets(token: str) -> Iterator[None]:
    """Take secrets out of what the client and its HTTP library log, wherever it is shown."""
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
