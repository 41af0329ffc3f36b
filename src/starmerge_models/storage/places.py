"""Names of places: paths of this machine, and URLs of object stores and of the Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from starmerge_models.errors import UsageError

SCHEMES = ("s3", "gs", "az", "hf")
"""Of URLs that are read: Amazon S3 and what speaks its language, Google Cloud Storage, Azure Blob
Storage, the Hugging Face Hub."""

WRITTEN = ("s3", "gs", "az")
"""Of URLs that merges are written to."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


@dataclass(frozen=True, order=True)
class RemotePlace:
    """A file or a folder of a store that is reached over the network.

    It is named as paths are named, and cannot be opened: its storage reads it.

    Args:
        scheme: One of :data:`SCHEMES`.
        root: The bucket or the container; of the Hub, ``org/name`` or ``org/name@revision``.
        path: What follows, without a slash at either end; empty for the root itself.
    """

    scheme: str
    root: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.root}" + (f"/{self.path}" if self.path else "")

    def __truediv__(self, name: str) -> RemotePlace:
        return RemotePlace(self.scheme, self.root, _normal(f"{self.path}/{name}"))

    @property
    def name(self) -> str:
        """The last part of the path; of the root itself, its name."""
        return PurePosixPath(self.path or self.root).name

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePlace:
        """The folder that it lies in; the root lies in itself."""
        return RemotePlace(self.scheme, self.root, self.path.rpartition("/")[0])

    @property
    def parents(self) -> tuple[RemotePlace, ...]:
        """The folder that it lies in, the one above, and so on up to the root."""
        found, place = list[RemotePlace](), self
        while place.path:
            place = place.parent
            found.append(place)
        return tuple(found)

    def with_name(self, name: str) -> RemotePlace:
        """Return the place beside this one that has another name."""
        return self.parent / name


Place: TypeAlias = Path | RemotePlace
"""Where a file or a folder lies."""


def is_url(text: str | Path) -> bool:
    """Tell whether a text is meant as a URL, such as ``s3://bucket/model``, and not as a path.

    Two slashes may have become one, as in paths.
    """
    return _URL.match(str(text)) is not None


def place_of(text: str | os.PathLike[str] | RemotePlace) -> Place:
    """Return the place that a path or a URL names; ``~`` stands for the user's folder.

    A URL of another kind than :data:`SCHEMES` is taken for a path, which does not exist.

    Raises:
        UsageError: The URL has no bucket, or contains a password or a signature; or no user of this
            machine is called so.
    """
    if isinstance(text, RemotePlace):
        return text
    found = _URL.match(str(text))
    if found is not None and found[1].lower() in SCHEMES:
        return _remote(found[1].lower(), str(text)[found.end() :].strip("/"))
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{text}: no user of this machine is called so. Give a folder.") from error


def without_secrets(text: str) -> str:
    """Return a text with what URLs in it may carry of passwords and signatures left out."""
    return _QUERY.sub(r"\1?…", _PASSWORD.sub(r"\1…@", text))


_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/{1,2})[^\s/@:]*:[^\s/@]*@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/[^\s?\"'<>]*)\?[^\s\"'<>)]*")


def relative(file: Place, folder: Place) -> str:
    """Return how a file is called from a folder, with slashes between the parts."""
    if isinstance(file, Path) and isinstance(folder, Path):
        return os.path.relpath(file, folder)
    return str(file).removeprefix(f"{folder}/")


def _remote(scheme: str, rest: str) -> RemotePlace:
    shown = without_secrets(f"{scheme}://{rest}")
    if "?" in rest or (scheme != "hf" and "@" in rest.partition("/")[0]):
        raise UsageError(
            f"{shown} carries credentials or a query. Give the bare URL, and the credentials in "
            "the environment."
        )
    if _UNNAMEABLE.search(rest):
        raise UsageError(
            f"{shown!r} has a control character, such as a tab or a line break, or bytes that are "
            "no UTF-8. Give a URL without them."
        )
    parts = _normal(rest).split("/")
    count = 2 if scheme == "hf" else 1
    if len(parts) < count or not all(parts[:count]):
        wanted = "hf://org/name" if scheme == "hf" else f"{scheme}://bucket/folder"
        raise UsageError(f"{shown} names no place. Give {wanted}.")
    return RemotePlace(scheme, "/".join(parts[:count]), "/".join(parts[count:]))


_UNNAMEABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""What no key of an object has that obstore reads; bytes of an argument become surrogates."""


def _normal(path: str) -> str:
    """Return a path without empty parts and dots.

    Raises:
        UsageError: It leads up, which no store does.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UsageError(f"{path} contains '..', which object stores do not follow. Write it out.")
    return "/".join(parts)
