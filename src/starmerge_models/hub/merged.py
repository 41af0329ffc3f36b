"""A folder that may be pushed: a merge that is whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.verify import check_files, read_report
from starmerge_models.storage import is_url, place_of
from starmerge_models.storage.local_folder import LocalFolder

_MOST_TOLD = 5
"""Faults that an error names."""


@dataclass(frozen=True)
class Merged:
    """The folder of a merge."""

    path: Path
    report: Mapping[str, Any]
    files: tuple[str, ...]
    """What is pushed, relative to the folder, sorted."""
    others: tuple[str, ...]
    """What else lies there, and is not pushed: hidden files, and those that the report lacks."""

    @property
    def local_inputs(self) -> list[str]:
        """Folders of this machine that report and card name by their whole path, sorted."""
        named = {str(entry["reference"]) for entry in self.report["inputs"]}
        return sorted(name for name in named if name.startswith(("/", "~")))


def open_merged(path: Path) -> Merged:
    """Open the folder of a merge, and make sure that it is whole.

    Names, sizes, headers, and the bytes of all files without tensors are compared with the report;
    the tensors are not read (``starmerge verify`` does that).

    Raises:
        UsageError: It is no folder that a merge wrote.
        StarmergeError: Something in it is missing, or is not what the report says.
    """
    if is_url(path):
        raise UsageError(
            f"{place_of(path)} is a URL, and a folder of this machine is pushed. Copy it here."
        )
    if path.is_file():
        raise UsageError(
            f"{path} is one file, without a report and a card, and folders are pushed. Merge again "
            "with a folder as OUTPUT: the file comes to lie in it, with both."
        )
    report = read_report(path)
    wrong = [f"{name} lies outside of it." for name in report["files"] if not _is_in(path, name)]
    wrong = wrong or check_files(path, report)
    if wrong:
        told = " ".join(wrong[:_MOST_TOLD])
        more = f" And {len(wrong) - _MOST_TOLD} more." if len(wrong) > _MOST_TOLD else ""
        raise StarmergeError(f"{path} is not the merge that its report describes: {told}{more}")
    files = sorted(name for name in report["files"] if not _is_hidden(name))
    others = [name for name in LocalFolder(path).names() if name not in files]
    return Merged(path, report, tuple(files), tuple(others))


def _is_in(folder: Path, name: str) -> bool:
    """Tell whether a file of a report lies in its folder, whatever links lead there."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        return False
    return (folder / name).resolve().is_relative_to(folder.resolve())


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
