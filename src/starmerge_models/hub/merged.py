"""Checks that a folder is a complete merge, which may be pushed."""

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
"""Most faults that an error message lists."""


@dataclass(frozen=True)
class MergedFolder:
    """The folder of a merge."""

    path: Path
    report: Mapping[str, Any]
    files: tuple[str, ...]
    """The files to push, relative to the folder, sorted."""
    others: tuple[str, ...]
    """Files that are not pushed: hidden files, and those missing in the report."""

    @property
    def local_inputs(self) -> list[str]:
        """Local folders that report and card name by their absolute path, sorted."""
        named = {str(entry["reference"]) for entry in self.report["inputs"]}
        return sorted(name for name in named if name.startswith(("/", "~")))


def open_merged(path: Path) -> MergedFolder:
    """Open the folder of a merge, and make sure that it is complete.

    The check compares names, sizes, headers, and the bytes of all files without tensors with the
    report; it does not read the tensors (``starmerge verify`` does).

    Raises:
        UsageError: The folder was not written by a merge.
        StarmergeError: A file is missing, or differs from the report.
    """
    if is_url(path):
        raise UsageError(
            f"{place_of(path)} is a URL, and only a local folder can be pushed. Copy it here."
        )
    if path.is_file():
        raise UsageError(
            f"{path} is a single file without a report and a card, and only folders can be pushed. "
            "Merge again with a folder as OUTPUT, which will contain all three."
        )
    report = read_report(path)
    wrong = [f"{name} is outside of it." for name in report["files"] if not _is_in(path, name)]
    wrong = wrong or check_files(path, report)
    if wrong:
        told = " ".join(wrong[:_MOST_TOLD])
        more = f" And {len(wrong) - _MOST_TOLD} more." if len(wrong) > _MOST_TOLD else ""
        raise StarmergeError(f"{path} is not the merge that its report describes: {told}{more}")
    files = sorted(name for name in report["files"] if not _is_hidden(name))
    others = [name for name in LocalFolder(path).names() if name not in files]
    return MergedFolder(path, report, tuple(files), tuple(others))


def _is_in(folder: Path, name: str) -> bool:
    """Return whether a file of a report is inside its folder, with all links resolved."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        return False
    return (folder / name).resolve().is_relative_to(folder.resolve())


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
