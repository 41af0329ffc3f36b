"""Places of files: local paths, and URLs of object stores and of the Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from starmerge_models.errors import UsageError

SCHEMES = ("s3", "gs", "az", "hf")
"""Schemes of readable URLs: Amazon S3 and compatible stores, Google Cloud Storage, Azure Blob
Storage, the Hugging Face Hub."""

WRITTEN = ("s3", "gs", "az")
"""Schemes of URLs to which merges can be written."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


@dataclass(frozen=True, order=True)
class RemotePlace:
    """A file or a folder of a remote store.

    It has the naming methods of ``pathlib.Path``, but cannot be opened: its storage reads it.

    Args:
        scheme: One of :data:`SCHEMES`.
        root: The bucket or the container; for the Hub, ``org/name`` or ``org/name@revision``.
        path: The path below the root, without a slash at either end; empty for the root itself.
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
        """The last part of the path; for the root itself, the root's name."""
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
        """The parent folder; the parent of the root is the root itself."""
        return RemotePlace(self.scheme, self.root, self.path.rpartition("/")[0])

    @property
    def parents(self) -> tuple[RemotePlace, ...]:
        """All parent folders up to the root, the nearest first."""
        found, place = list[RemotePlace](), self
        while place.path:
            place = place.parent
            found.append(place)
        return tuple(found)

    def with_name(self, name: str) -> RemotePlace:
        """Return a place in the same folder with another name."""
        return self.parent / name


Place: TypeAlias = Path | RemotePlace
"""The place of a file or a folder."""


def is_url(text: str | Path) -> bool:
    """Return whether a text is a URL such as ``s3://bucket/model``, not a path.

    A single slash after the colon is accepted too, because ``pathlib`` merges double slashes.
    """
    return _URL.match(str(text)) is not None


def place_of(text: str | os.PathLike[str] | RemotePlace) -> Place:
    """Return the place of a path or a URL; ``~`` is replaced by the user's folder.

    A URL with a scheme other than :data:`SCHEMES` is treated as a path, which does not exist.

    Raises:
        UsageError: The URL has no bucket, or contains a password or a signature; or the user of a
            ``~name`` path does not exist.
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
    """Return a text with passwords and signatures removed from its URLs."""
    return _QUERY.sub(r"\1?…", _PASSWORD.sub(r"\1…@", text))


_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/{1,2})[^\s/@:]*:[^\s/@]*@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/[^\s?\"'<>]*)\?[^\s\"'<>)]*")


def relative(file: Place, folder: Place) -> str:
    """Return the path of a file relative to a folder, with slashes."""
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
"""Characters that obstore does not support in keys; surrogates come from undecodable arguments."""


def _normal(path: str) -> str:
    """Return a path without empty parts and dots.

    Raises:
        UsageError: The path contains '..', which stores do not support.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UsageError(f"{path} contains '..', which object stores do not follow. Write it out.")
    return "/".join(parts)
