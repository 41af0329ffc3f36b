"""Where bytes lie: the storages, and which of them a place belongs to."""

from starmerge.storage.local import LOCAL
from starmerge.storage.storage import (
    FileState,
    OutputFile,
    OutputFolder,
    Place,
    ShortFileError,
    Storage,
    is_url,
)

__all__ = [
    "FileState",
    "OutputFile",
    "OutputFolder",
    "Place",
    "ShortFileError",
    "Storage",
    "exists",
    "is_file",
    "is_url",
    "storage_of",
]


def storage_of(place: Place) -> Storage:
    """Return the storage that a place belongs to: this machine's, of every path."""
    return LOCAL


def exists(place: Place) -> bool:
    """Tell whether anything lies at a place."""
    return storage_of(place).exists(place)


def is_file(place: Place) -> bool:
    """Tell whether a file lies at a place."""
    return storage_of(place).is_file(place)
