"""References to models: a folder or Hub id, a model with adapters, or a stack of layers.

::

    org/model@v2                     a model or an adapter
    demo:digits                      a model of the demo
    org/model+org/adapter            the model with the adapter folded in
    org/a[0:24],org/b[8:32]          layers 0 to 23 of a, then layers 8 to 31 of b
    org/a[encoder 0:6],org/b[decoder 0:12]    layers of one part of the model each

A folder whose own name looks like one of these is taken for the folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starmerge_models.checkpoints.source import WEIGHTS
from starmerge_models.demo_names import PREFIX
from starmerge_models.errors import UsageError
from starmerge_models.storage import exists, place_of

_PIECE = re.compile(r"(?P<models>.+?)\[(?:(?P<part>\w+) )?(?P<start>\d+):(?P<stop>\d+)\](?:,|$)")


@dataclass(frozen=True)
class Cut:
    """A range of a model's layers."""

    start: int
    """The first layer."""
    stop: int
    """The layer after the last."""
    part: str = ""
    """The part of a model with several stacks of layers; empty for a model with one stack."""

    @property
    def size(self) -> int:
        """Number of layers."""
        return self.stop - self.start

    def __str__(self) -> str:
        part = f"{self.part} " if self.part else ""
        return f"[{part}{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Piece:
    """A model, or some layers of it."""

    models: tuple[str, ...]
    """Folders or Hub ids: a model, and the adapters that are folded into it."""
    cut: Cut | None = None
    """The layers; None for the whole model."""

    def __str__(self) -> str:
        return "+".join(self.models) + str(self.cut or "")


def is_place(text: str) -> bool:
    """Return whether a folder or a file of this path exists."""
    try:
        return exists(place_of(text))
    except UsageError:  # an unknown user, or an invalid URL
        return False


def parse_reference(text: str, is_there: Callable[[str], bool] = is_place) -> tuple[Piece, ...]:
    """Return the pieces of a reference.

    Args:
        text: The reference.
        is_there: Returns whether a folder exists.

    Raises:
        UsageError: An operand of a ``+`` is missing, or a range of layers is empty.
    """
    if {"+", "["}.isdisjoint(text) or is_there(text):
        return (Piece((text,)),)
    pieces, place = list[Piece](), 0
    while found := _PIECE.match(text, place):
        cut = Cut(int(found["start"]), int(found["stop"]), found["part"] or "")
        if cut.start >= cut.stop:
            raise UsageError(f"{text}: {cut} holds no layer. The last one is not counted: [0:8].")
        pieces.append(Piece(_summands(found["models"], is_there), cut))
        place = found.end()
    if place < len(text) and pieces:
        raise UsageError(
            f"{text}: {text[place:]!r} says no layers. Each piece of a stack does: A[0:8],B[4:12]."
        )
    return tuple(pieces) or (Piece(_summands(text, is_there)),)


def spell(pieces: Sequence[Piece]) -> str:
    """Return the reference text of pieces, the inverse of :func:`parse_reference`."""
    return ",".join(map(str, pieces))


def map_reference(
    text: str, place: Callable[[str], str], is_there: Callable[[str], bool] = is_place
) -> str:
    """Return a reference with each folder or Hub id in it replaced.

    Args:
        text: The reference.
        place: Returns the replacement of a folder or Hub id.
        is_there: Returns whether a folder exists.
    """
    pieces = parse_reference(text, is_there)
    return spell([Piece(tuple(map(place, p.models)), p.cut) for p in pieces])


def name_of(text: str) -> str:
    """Return the default name of a model from its reference: the last parts of its paths.

    The revision of a Hub id, the suffix of a file and the prefix ``demo:`` are left out.
    """

    def last(place: str) -> str:
        name = place.removeprefix(PREFIX).rstrip("/").rpartition("/")[2].partition("@")[0]
        ending = next((end for end in WEIGHTS if name.lower().endswith(end)), "")
        return name[: len(name) - len(ending)] or place

    try:
        return map_reference(text, last)
    except UsageError:  # of a folder that is found elsewhere, or not at all
        return last(text)


def _summands(text: str, is_there: Callable[[str], bool]) -> tuple[str, ...]:
    """Split a reference into a model and its adapters; a + inside a folder's name is kept."""
    parts, found = text.split("+"), list[str]()
    while parts:
        n = next(n for n in range(len(parts), 0, -1) if n == 1 or is_there("+".join(parts[:n])))
        found.append("+".join(parts[:n]))
        parts = parts[n:]
    if len(found) > 1 and not all(found):
        raise UsageError(f"{text}: nothing stands beside a '+'. Write MODEL+ADAPTER.")
    return tuple(found)
