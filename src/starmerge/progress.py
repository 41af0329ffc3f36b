"""What a long run tells its user: a progress bar, and how much there is to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    description: str, total: int, *, show: bool, in_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error, where a person sees it; yield the function that moves it on.

    In a file or a pipe, all that there is of a bar would be an empty line.

    Args:
        description: What is being done.
        total: Units in all.
        show: Whether to show it on a terminal or in a notebook; without, the function yielded does
            nothing. It takes a number of units.
        in_bytes: Whether the units are bytes.
    """
    if not show:
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415  (only where a bar is drawn)
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    is_seen = console.is_terminal or console.is_jupyter
    with Progress(*columns, console=console, transient=True, disable=not is_seen) as bar:
        task = bar.add_task(description, total=total)
        yield lambda units: bar.advance(task, units)


def bytes_in_words(count: int) -> str:
    """Write a number of bytes for people: "1.25 GB", "0.3 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
