"""Storages of files: local file systems, object stores and the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starmerge_models.storage.local import LOCAL
from starmerge_models.storage.local_folder import LocalFolder
from starmerge_models.storage.places import (
    Place,
    RemotePlace,
    is_url,
    place_of,
    relative,
    without_secrets,
)
from starmerge_models.storage.remote import remote_storage
from starmerge_models.storage.storage import (
    FileState,
    OutputFile,
    OutputFolder,
    ShortFileError,
    Storage,
)

__all__ = [
    "FileState",
    "OutputFile",
    "OutputFolder",
    "Place",
    "RemotePlace",
    "ShortFileError",
    "Storage",
    "copy_file",
    "exists",
    "is_file",
    "is_url",
    "local_files",
    "place_of",
    "real",
    "relative",
    "storage_of",
    "without_secrets",
]


def storage_of(place: Place) -> Storage[Any]:
    """Return the storage that a place belongs to.

    Raises:
        StarmergeError: The libraries for this storage are not installed.
    """
    return LOCAL if isinstance(place, Path) else remote_storage(place.scheme)


def exists(place: Place) -> bool:
    """Return whether a place exists."""
    return storage_of(place).exists(place)


def is_file(place: Place) -> bool:
    """Return whether a place is a file."""
    return storage_of(place).is_file(place)


def real(place: Place) -> Place:
    """Return the place with all symbolic links resolved, to compare places."""
    return storage_of(place).real(place)


def copy_file(file: Place, folder: OutputFolder, name: str) -> None:
    """Copy a whole file into an output.

    Args:
        file: The file.
        folder: The output.
        name: Name of the copy in the output.

    Raises:
        OSError: A storage failed or is full.
    """
    storage = storage_of(file)
    size = storage.state(file).size
    target = folder.open(name, size)
    try:
        storage.copy(file, 0, size, target, 0)
    finally:
        target.close()


@contextmanager
def local_files(folder: Place, names: Collection[str]) -> Iterator[Path]:
    """Yield a local folder with some files, for libraries that open files themselves.

    Args:
        folder: Folder of the files. A local folder is yielded itself, for a remote folder a
            temporary folder with copies.
        names: The files, relative to the folder; missing files are skipped.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="starmerge-") as scratch:
        for name in names:
            if is_file(folder / name):
                copy_file(folder / name, LocalFolder(Path(scratch)), name)
        yield Path(scratch)
