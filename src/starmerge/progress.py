"""What a long run tells its user: a progress bar, and how much there is to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Progress:
    """What a long run tells of itself: how much is done, and what is being waited for.

    Called with a number of units, it moves on.

    Args:
        description: What the run does.
        bar: Where that is shown, and the bar's id there; None: nowhere.
    """

    def __init__(self, description: str = "", bar: tuple[Bar, TaskID] | None = None) -> None:
        self._description, self._bar = description, bar

    def __call__(self, units: int) -> None:
        """Move on by some units."""
        if self._bar is not None:
            bar, task = self._bar
            bar.advance(task, units)

    def expects(self, total: int) -> None:
        """Say how many units there are in all, where that was not known at the beginning."""
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, total=total)

    def waits_for(self, what: str) -> None:
        """Say what is being done now: "loading base", "asking merged: past"."""
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, description=f"{self._description}: {what}")


SILENT = Progress()
"""Tells nothing."""


@contextmanager
def progress_bar(
    description: str, total: int | None, *, show: bool, in_bytes: bool = False
) -> Iterator[Progress]:
    """Show a bar on standard error, where a person sees it; yield what moves it on.

    In a file or a pipe, all that there is of a bar would be an empty line.

    Args:
        description: What is being done.
        total: Units in all; None: not known yet.
        show: Whether to show it on a terminal or in a notebook; without, what is yielded tells
            nothing.
        in_bytes: Whether the units are bytes.
    """
    if not show:
        yield SILENT
        return
    from rich.console import Console  # noqa: PLC0415  (only where a bar is drawn)
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    is_seen = console.is_terminal or console.is_jupyter
    with Bar(*columns, console=console, transient=True, disable=not is_seen) as bar:
        yield Progress(description, (bar, bar.add_task(description, total=total)))


def bytes_in_words(count: int) -> str:
    """Write a number of bytes for people: "1.25 GB", "0.3 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
