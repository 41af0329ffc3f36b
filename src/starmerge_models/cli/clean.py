"""``starmerge clean``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from starmerge_models.cli.printing import AsJson, Printer
from starmerge_models.errors import UsageError
from starmerge_models.events import bytes_in_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starmerge_models.storage.storage import PartialOutput


def clean(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder in which outputs stand, not an output itself; or the URL of an output."
        ),
    ] = Path(),
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what is listed as left over, after asking.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what killed runs have left, and delete it with --delete.

    An output is made under a hidden name beside its place, .NAME.partial-…; a folder that it
    replaces is .NAME.replaced-… until it is deleted. A run that is killed (kill -9, a power cut)
    leaves such folders. One that belongs to a run that still goes on is never deleted; runs on
    other machines that share the folder cannot be seen: look at its age.

    The output of a URL is made on this machine before it is uploaded, or by the machines of a
    cluster in pieces beside it: given the URL, both are listed.

    Example: starmerge clean models

    Example: starmerge clean models --delete

    Example: starmerge clean s3://bucket/merged
    """
    from starmerge_models.storage import RemotePlace, place_of, storage_of
    from starmerge_models.storage.leftovers import leftovers_in

    printer = Printer(as_json)
    if as_json and delete and not yes:
        raise UsageError("--json asks nothing: with --delete, give --yes, too.")
    if yes and not delete:
        raise UsageError("--yes answers the question of --delete. Give both.")
    place = place_of(folder)
    found: Sequence[PartialOutput]
    if isinstance(place, RemotePlace):
        found = storage_of(place).leftovers(place)
    elif place.is_dir():
        found = leftovers_in(place)
    else:
        raise UsageError(f"{place} is no folder. Give the folder in which outputs stand.")
    if not found:
        printer.result([])
        where = place if isinstance(place, RemotePlace) else place.absolute()
        printer.text(f"Nothing is left over in {where}.")
        return
    states = [_state(leftover) for leftover in found]
    printer.text(*_lines(found, states))
    old = [leftover for leftover, state in zip(found, states, strict=True) if state == _LEFT]
    records = _records(found, states, deleted=old if delete else [])
    if not old:
        printer.result(records)
        return
    size = bytes_in_words(sum(leftover.nbytes for leftover in old))
    if not delete:
        printer.result(records)
        printer.text(f"To delete what is left over, {size}: give --delete.")
        return
    noun = "it" if len(old) == 1 else f"the {len(old)} that are left over"
    if not yes and not typer.confirm(f"Delete {noun}, {size}?"):
        return
    for leftover in old:
        leftover.delete()
    printer.result(records)
    printer.text(f"Deleted {len(old)}, {size}.")


_LEFT = "left over"
_IN_WORK = "in work: a process is making it"
_ONLY_COPY = "the only copy: its output does not exist. Rename it, or delete it yourself"


def _state(leftover: PartialOutput) -> str:
    if leftover.is_in_work():
        return _IN_WORK
    return _ONLY_COPY if leftover.is_only_copy() else _LEFT


def _lines(found: Sequence[PartialOutput], states: Sequence[str]) -> list[str]:
    """Return a table of leftovers: the name last, so that no width cuts it."""
    now = time.time()
    return [
        f"{bytes_in_words(leftover.nbytes):>10}  {_age(now - leftover.written):>8} old  "
        f"{leftover.path}  ({state})"
        for leftover, state in zip(found, states, strict=True)
    ]


def _records(
    found: Sequence[PartialOutput], states: Sequence[str], deleted: Sequence[PartialOutput]
) -> list[dict[str, Any]]:
    """Return leftovers as plain data, with the time of the last write in seconds since 1970."""
    return [
        {
            "path": leftover.path,
            "bytes": leftover.nbytes,
            "written": leftover.written,
            "state": state,
            "deleted": leftover in deleted,
        }
        for leftover, state in zip(found, states, strict=True)
    ]


def _age(seconds: float) -> str:
    """Write a time for people: "45 s", "12 min", "5 h", "3 days"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
