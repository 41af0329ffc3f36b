"""Stacks of layers of several models: a base, and fine-tunes with the same layers.

Tensors applied before the layers, such as embeddings, come from the first piece, and tensors
applied after the layers from the last piece. ``config.json``, with the new number of layers, and
other side files come from the first piece.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from starmerge_models.checkpoints.base import Base, open_base
from starmerge_models.checkpoints.configs import compare_configs
from starmerge_models.checkpoints.folded import Composite, open_folded
from starmerge_models.checkpoints.layers import (
    OF_ALL_LAYERS,
    PARTS,
    is_before_layers,
    is_of,
    layer_of,
)
from starmerge_models.checkpoints.models import FineTune
from starmerge_models.checkpoints.references import Cut, Piece, parse_reference, spell
from starmerge_models.checkpoints.source import Source, resolve
from starmerge_models.checkpoints.stacked_config import restacked
from starmerge_models.checkpoints.tensors import TensorInfo
from starmerge_models.deltas import Delta
from starmerge_models.errors import UsageError

_OF_LAYERS = ("layer_types",)
"""Config keys with an entry for each layer, which is copied with the layer."""


class Spot(NamedTuple):
    """The origin of a tensor of a stack."""

    piece: int
    """The number of the piece."""
    name: str
    """The tensor's name in the model of that piece."""
    in_layer: bool
    """Whether it belongs to one of the stacked layers."""


@dataclass(frozen=True)
class StackedBase(Base):
    """A base of layers of several models."""

    pieces: tuple[Piece, ...] = ()
    bases: tuple[Base, ...] = ()
    """The model of each piece."""
    spots: Mapping[str, Spot] = field(default_factory=dict)
    """The origin of each tensor."""

    @property
    def parts(self) -> tuple[Base, ...]:
        """The models of the pieces, without duplicates."""
        return tuple({base.source.reference: base for base in self.bases}.values())

    def untied(self, head: str, ties: Mapping[str, str]) -> Base:
        """Return the same stack with untied output layers; see :class:`Base`."""
        bases = [base.untied(head, ties) if base.tied else base for base in self.bases]
        return _stacked(self.pieces, bases, self.notes)


@dataclass(frozen=True)
class StackedModel(Composite):
    """A model to merge whose layers come from other models, which are its parts."""

    spots: Mapping[str, tuple[FineTune, str]]
    """For each tensor that a piece changes, the piece's model and the name in its base."""

    @property
    def kind(self) -> str:
        """Description of the kind of model."""
        kinds = dict.fromkeys(part.kind for part in self.parts)
        return f"layers of {', '.join(kinds)}"

    @property
    def base_name(self) -> None:
        """None: the layers may come from several bases."""

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the base's tensors that the model changes."""
        return frozenset(self.spots)

    def inputs(self, tensor: str) -> list[TensorInfo]:
        """Return the tensors that are read for a tensor's delta."""
        model, name = self.spots[tensor]
        return model.inputs(name)

    def rank(self, tensor: str) -> int | None:
        """Return an upper bound of the rank of a tensor's delta, None if it may be full."""
        model, name = self.spots[tensor]
        return model.rank(name)

    def needs_base(self, tensor: str) -> bool:
        """Return whether a tensor's delta is computed with the base's weight."""
        model, name = self.spots[tensor]
        return model.needs_base(name)

    def module(self, tensor: str) -> None:
        """Return None: layer numbers differ from those of the adapters."""

    def delta(self, tensor: str, base: Tensor | None) -> Delta:
        """Return a tensor's delta, given the base's tensor if it is needed."""
        model, name = self.spots[tensor]
        return model.delta(name, base)


def bases_of(base: Base) -> tuple[Base, ...]:
    """Return the models of a stacked base without duplicates, or the base itself."""
    return base.parts if isinstance(base, StackedBase) else (base,)


def parts_of(model: FineTune) -> tuple[FineTune, ...]:
    """Return the models with separate folders of which a model to merge consists."""
    if isinstance(model, Composite):
        return tuple(own for part in model.parts for own in parts_of(part))
    return (model,)


def open_referenced_base(reference: str, *, any_base: bool = False) -> Base:
    """Open a base by its reference: a model, or a stack of layers.

    Args:
        reference: The reference.
        any_base: Stack layers even if their configs define different functions of the weights.

    Raises:
        UsageError: The reference has adapters, or a range of layers does not fit.
        StarmergeError: A file is missing or broken.
    """
    pieces = parse_reference(reference)
    for piece in pieces:
        if len(piece.models) > 1:
            raise UsageError(
                f"{reference}: the base is a model with an adapter. Merge the two first, or give "
                f"{piece.models[0]} as the base and the adapter as one of the models."
            )
    if pieces[0].cut is None:
        return open_base(resolve(pieces[0].models[0], may_be_file=True))
    opened = {
        piece.models[0]: open_base(resolve(piece.models[0], may_be_file=True)) for piece in pieces
    }
    notes = _compared(list(opened.values()), any_base=any_base)
    return _stacked(pieces, [opened[piece.models[0]] for piece in pieces], notes)


def open_referenced_model(
    name: str, reference: str, base: Base, *, any_base: bool = False, common: bool = False
) -> FineTune:
    """Open a model to merge by any reference that :func:`parse_reference` accepts.

    For a stacked base, the same layers are taken of the model, unless the reference gives others.

    Args:
        name: The model's name in tables and reports.
        reference: The reference.
        base: The base of the merge.
        any_base: As for :func:`starmerge_models.checkpoints.models.open_model`.
        common: As for :func:`starmerge_models.checkpoints.models.open_model`.

    Raises:
        UsageError: The layers of the model do not correspond to those of the base.
        StarmergeError: As for :func:`starmerge_models.checkpoints.models.open_model`.
    """
    pieces = parse_reference(reference)
    if not isinstance(base, StackedBase):
        if pieces[0].cut is None:
            (piece,) = pieces
            return open_folded(name, piece.models, base, any_base=any_base, common=common)
        base = _cut_like(pieces, base)
    if pieces[0].cut is None:
        pieces = tuple(Piece(pieces[0].models, own.cut) for own in base.pieces)
    if [(c.part, c.size) for c in _cuts(pieces)] != [(c.part, c.size) for c in _cuts(base.pieces)]:
        raise UsageError(
            f"{reference} is cut otherwise than the base {spell(base.pieces)}. The pieces of both "
            "must have as many layers, one after the other."
        )
    opened: dict[tuple[tuple[str, ...], str, bool], FineTune] = {}
    models = list[FineTune]()
    for piece, below, own in zip(pieces, base.bases, base.pieces, strict=True):
        aligned = piece.cut == own.cut
        key = piece.models, below.source.reference, aligned
        if key not in opened:
            opened[key] = open_folded(
                name, piece.models, below, any_base=any_base, common=common, alone=aligned
            )
        models.append(opened[key])
    steps = [own.start - c.start for own, c in zip(_cuts(pieces), _cuts(base.pieces), strict=True)]
    for piece, model, step in zip(pieces, models, steps, strict=True):
        if step and parts_of(model)[0].kind != "full fine-tune":
            raise UsageError(
                f"{piece} is an adapter of other layers than those of the base, "
                f"{spell(base.pieces)}. Write MODEL+ADAPTER for the model that it was trained on."
            )
    spots = {}
    for tensor, spot in base.spots.items():
        model = models[spot.piece]
        inner = _moved(spot.name, steps[spot.piece]) if spot.in_layer else spot.name
        if inner in model.tensors:
            spots[tensor] = model, inner
    source = Source(reference, models[0].source.path, None, None)
    return StackedModel(name, source, tuple(opened.values()), spots)


def _compared(bases: Sequence[Base], *, any_base: bool) -> tuple[str, ...]:
    """Compare the configs of the models of a stack.

    Returns:
        A note on each model whose config defines another function than that of the first.

    Raises:
        UsageError: There is such a model, and ``any_base`` is not set.
    """
    first, *others = bases
    notes = []
    for other in others:
        own, theirs = (
            {key: value for key, value in base.config.items() if key not in _OF_LAYERS}
            for base in (first, other)
        )
        if differences := compare_configs(own, theirs).function:
            note = (
                f"{other.source}: by its config.json its layers are other functions of their "
                f"weights than those of {first.source}, whose config the stack has: "
                f"{'; '.join(differences)}."
            )
            if not any_base:
                raise UsageError(f"{note} If this changes nothing, say so with --any-base.")
            notes.append(note)
    return tuple(notes)


def _stacked(
    pieces: Sequence[Piece], bases: Sequence[Base], notes: Sequence[str] = ()
) -> StackedBase:
    """Stack pieces of opened models.

    Args:
        pieces: The pieces.
        bases: The models of the pieces.
        notes: Notes for the user.
    """
    first, cuts = bases[0], _cuts(pieces)
    config = first.config
    spots: dict[str, Spot] = {}
    left = dict.fromkeys(first.checkpoint)
    for part in dict.fromkeys(cut.part for cut in cuts):
        numbers = [number for number, cut in enumerate(cuts) if cut.part == part]
        family, count, _ = _layers(first, part)
        of_each = {}
        for number in numbers:
            of_each[number] = _checked_layers(bases[number], first, cuts[number])
        picked = [
            (number, i) for number in numbers for i in range(cuts[number].start, cuts[number].stop)
        ]
        for place, (number, index) in enumerate(picked):
            for name in of_each[number][index]:
                spots[f"{family}.{place}{name.removeprefix(f'{family}.{index}')}"] = Spot(
                    number, name, True
                )
        config = restacked(config, part, count, [(bases[n].config, i) for n, i in picked])
        for name in [name for name in left if is_of(part, name)]:
            del left[name]
            if _index(name, family) is None:
                number = numbers[0] if is_before_layers(name) else numbers[-1]
                spots[name] = Spot(number, _outside(name, bases[number], first), False)
    spots |= {name: Spot(0, name, False) for name in left}
    tensors = [bases[s.piece].checkpoint[s.name].renamed(name) for name, s in spots.items()]
    source = Source(spell(pieces), first.source.path, None, None)
    own_notes = (note for base in bases for note in base.notes)
    return StackedBase(
        source,
        first.checkpoint.viewed(tensors),
        config,
        tuple(dict.fromkeys((*notes, *own_notes))),
        next((base.quantised for base in bases if base.quantised is not None), None),
        pieces=tuple(pieces),
        bases=tuple(bases),
        spots=spots,
    )


def _cut_like(pieces: Sequence[Piece], base: Base) -> StackedBase:
    """Split a base, from its first layer, into pieces of the lengths of a model's pieces."""
    own, places = [], defaultdict[str, int](int)
    for cut in _cuts(pieces):
        start = places[cut.part]
        places[cut.part] = stop = start + cut.size
        own.append(Piece((base.source.reference,), Cut(start, stop, cut.part)))
    for part, stop in places.items():
        _, count, _ = _layers(base, part)
        if stop != count:
            raise UsageError(
                f"{spell(pieces)} has {stop} layers, and the base {base.source} {count}. Say "
                "which layers of the base they belong to: BASE[0:8],BASE[4:12]."
            )
    return _stacked(own, [base] * len(own))


def _layers(base: Base, part: str) -> tuple[str, int, dict[int, list[str]]]:
    """Return the name prefix of a part's layers, their number, and the tensors of each.

    Raises:
        UsageError: The part has no layers, or several stacks of layers.
    """
    found: dict[str, dict[int, list[str]]] = {}
    for name in base.checkpoint:
        family, _, number = layer_of(name).rpartition(".")
        if is_of(part, name) and _index(name, family) is not None:
            found.setdefault(family, {}).setdefault(int(number), []).append(name)
    if len(found) != 1:
        which = f" {part}" if part else ""
        have = (
            f"several stacks of{which} layers ({', '.join(found)})"
            if found
            else f"no{which} layers"
        )
        hint = f" Say of which part: MODEL[{PARTS[1]} 0:8]; there are {', '.join(PARTS)}."
        raise UsageError(f"{base.source} has {have}.{hint if found or part else ''}")
    ((family, layers),) = found.items()
    return family, max(layers) + 1, layers


def _checked_layers(base: Base, first: Base, cut: Cut) -> dict[int, list[str]]:
    """Return the tensors of each layer of a model, after checking them against the first model."""
    family, count, layers = _layers(base, cut.part)
    if cut.stop > count:
        raise UsageError(
            f"{base.source} has {count} layers, and {cut} goes beyond. The first is number 0, and "
            "the last of a range is not counted."
        )
    wanted, _, known = _layers(first, cut.part)
    if family != wanted:
        raise UsageError(
            f"The layers of {base.source} are called {family}, those of {first.source} {wanted}. "
            "Layers of different architectures cannot be stacked."
        )
    shapes = {(_rest(name), first.checkpoint[name].shape) for own in known.values() for name in own}
    for name in (name for own in layers.values() for name in own):
        shape = base.checkpoint[name].shape
        if (_rest(name), shape) not in shapes:
            raise UsageError(
                f"{base.source}: tensor {name} has the shape {list(shape)}, and no layer of "
                f"{first.source} has one like it. Layers of models of different sizes cannot be "
                "stacked."
            )
    return layers


def _outside(name: str, base: Base, first: Base) -> str:
    """Return a model's name for a tensor of the first model outside of its layers."""
    own, shape = name, first.checkpoint[name].shape
    if (
        name not in base.checkpoint
        and name in first.token_matrices
        and base.tied
        and base.embedding
    ):
        own = base.embedding  # which is the output layer, too
    if own not in base.checkpoint or base.checkpoint[own].shape != shape:
        has = list(base.checkpoint[own].shape) if own in base.checkpoint else "nothing"
        raise UsageError(
            f"{base.source} has {has} as {name}, and {first.source} a tensor of the shape "
            f"{list(shape)}. The models of a stack must be of one architecture and size."
        )
    return own


def _index(name: str, family: str) -> int | None:
    """Return the layer number of a tensor; None if it is not in a layer of the family."""
    prefix, _, number = layer_of(name).rpartition(".")
    if prefix != family or not number.isdecimal() or OF_ALL_LAYERS in name.split("."):
        return None
    return int(number)


def _rest(name: str) -> str:
    """Return a tensor's name within its layer."""
    return name.removeprefix(layer_of(name))


def _moved(name: str, step: int) -> str:
    """Return a tensor's name with its layer number shifted by ``step``."""
    prefix, _, number = layer_of(name).rpartition(".")
    return f"{prefix}.{int(number) + step}{_rest(name)}"


def _cuts(pieces: Sequence[Piece]) -> list[Cut]:
    return [piece.cut for piece in pieces if piece.cut is not None]
