"""Tables with a row for each token: which tensors they are, and their rows in another order.

Models whose tokenizers differ have their rows in different places. Before they can be subtracted
and merged, the rows of each are brought into the order of the merged model's tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.finetuned import FinetunedModel
from starmerge_models.checkpoints.lora.adapter import Adapter, PlacedUpdate
from starmerge_models.checkpoints.lora.update import Change, Read
from starmerge_models.checkpoints.models import FineTune
from starmerge_models.checkpoints.tensors import Checkpoint, Derived, TensorInfo
from starmerge_models.deltas import Delta, Dense, LowRank
from starmerge_models.errors import UsageError

ABSENT = -1
"""Stands for the row of a token that a table does not have."""


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of several tables, as one table.

    A row that several tables give is their mean, taken in float64; one that no table gives is the
    mean of all rows of the first, as for tokens that were never trained. Rows of one table keep
    their bits, but for a change of dtype.

    Args:
        rows: For each table the numbers of its rows, (n,) int64; :data:`ABSENT` where it has none.
        dtype: That of the result.
    """

    rows: tuple[Tensor, ...]
    dtype: torch.dtype

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return the table, (n, …)."""
        given = torch.stack([own != ABSENT for own in self.rows]).sum(0)
        result = torch.empty(len(given), *parts[0].shape[1:], dtype=self.dtype)
        for table, own in zip(parts, self.rows, strict=True):
            places = ((own != ABSENT) & (given == 1)).nonzero().flatten()
            result[places] = table[own[places]].to(result.dtype)
        for place in (given > 1).nonzero().flatten().tolist():
            pairs = zip(parts, self.rows, strict=True)
            several = [table[own[place]].double() for table, own in pairs if own[place] != ABSENT]
            result[place] = torch.stack(several).mean(0).to(result.dtype)
        if bool((given == 0).any()):
            result[given == 0] = parts[0].mean(0, dtype=torch.float64).to(result.dtype)
        return result


@dataclass(frozen=True, eq=False)
class _OtherTokens:
    """The change of a table, with its rows in the order of other tokens; others are not changed."""

    change: Change
    rows: Tensor
    """Its own row for each, (n,) int64, :data:`ABSENT` where it has none."""
    is_embedding: bool
    """Whether the table is the change's transpose."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors that it is made of."""
        return self.change.keys

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, in) or, of an embedding, (out, n)."""
        n, own = len(self.rows), self.change.shape
        return (own[0], n) if self.is_embedding else (n, *own[1:])

    @property
    def rank(self) -> int | None:
        """That of the change."""
        return self.change.rank

    def delta(self, read: Read) -> Delta:
        """Return the change, with zeros where it has no row."""
        delta = self.change.delta(read)
        if isinstance(delta, LowRank):
            if self.is_embedding:
                return LowRank(delta.B, self._moved(delta.A, 1), delta.scale)
            return LowRank(self._moved(delta.B, 0), delta.A, delta.scale)
        assert isinstance(delta, Dense)
        return Dense(self._moved(delta.matrix, 1 if self.is_embedding else 0))

    def _moved(self, matrix: Tensor, dim: int) -> Tensor:
        picked = matrix.index_select(dim, self.rows.clamp(min=0))
        absent = (self.rows == ABSENT).nonzero().flatten()
        return picked.index_fill(dim, absent, 0.0)


def table(
    name: str, parts: Sequence[TensorInfo], rows: Sequence[Tensor], dtype: torch.dtype
) -> TensorInfo:
    """Return rows of several tables as one tensor; see :class:`TokenRows`.

    Args:
        name: Its name.
        parts: The tables, which differ in their number of rows at most.
        rows: For each of them its rows, (n,) int64.
        dtype: Its dtype.
    """
    shape = (len(rows[0]), *parts[0].shape[1:])
    return Derived(name, dtype, shape, parts[0].file, tuple(parts), TokenRows(tuple(rows), dtype))


def with_tables(checkpoint: Checkpoint, tables: Mapping[str, TensorInfo]) -> Checkpoint:
    """Return a checkpoint with some of its entries exchanged, in their order."""
    return checkpoint.viewed(tables.get(name, info) for name, info in checkpoint.items())


def without_tables(model: FinetunedModel, names: Collection[str]) -> FinetunedModel:
    """Return a fine-tune that leaves some of the base's tables as they are."""
    return replace(model, found={n: info for n, info in model.found.items() if n not in names})


def own_table(model: FineTune, name: str) -> TensorInfo | None:
    """Return a model's own table for a tensor of the base, if it has one that is whole."""
    if isinstance(model, FinetunedModel):
        return model.found.get(name)
    if isinstance(model, Adapter) and name in model.replacements:
        return model.checkpoint[model.replacements[name]]
    return None


def _copied_table(model: FineTune, name: str) -> TensorInfo | None:
    """Return the base's table as a model was trained with it, if it comes with another one."""
    if isinstance(model, Adapter) and name in model.copies:
        return model.checkpoint[model.copies[name]]
    return None


def donor_rows(
    model: FineTune, base: Base, name: str, numbers: Sequence[int]
) -> tuple[TensorInfo, list[int]]:
    """Return what has some rows of a model for a tensor of the base, and where they are in it.

    A model that does not change the tensor has the base's rows, and those it was trained with.

    Args:
        model: The model, with its rows where its own tokenizer has them.
        base: The base, likewise.
        name: The tensor.
        numbers: The model's rows.

    Returns:
        A table, and for each of the rows its number there; :data:`ABSENT` where there is no such
        row.
    """
    own, ours = own_table(model, name), _copied_table(model, name) or base.checkpoint[name]
    if own is not None or not isinstance(model, Adapter) or name not in model.updates:
        whole = own or ours
        return whole, [n if n < whole.shape[0] else ABSENT for n in numbers]
    update = model.updates[name].update
    picked = torch.tensor(numbers, dtype=torch.int64)
    picked[picked >= ours.shape[0]] = ABSENT
    if update.magnitude:
        raise _immovable(model, name)
    keys = update.change.keys
    way = _AdaptedRows(update.change, picked, update.is_embedding)
    shape = (len(numbers), *ours.shape[1:])
    parts = (ours, *(model.checkpoint[key] for key in keys))
    made = Derived(name, ours.dtype, shape, ours.file, parts, way)
    return made, [i if n != ABSENT else ABSENT for i, n in enumerate(picked.tolist())]


@dataclass(frozen=True, eq=False)
class _AdaptedRows:
    """Rows of a table with an adapter's change.

    Args:
        change: The change, of an embedding the transpose of the table's.
        rows: Their numbers, (k,) int64; :data:`ABSENT` for any.
        is_embedding: Whether the table is an embedding's.
    """

    change: Change
    rows: Tensor
    is_embedding: bool

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return the rows, (k, …), of the table and of what the change is made of."""
        table, *stored = parts
        read = dict(zip(self.change.keys, stored, strict=True)).__getitem__
        rows = self.rows.clamp(min=0)
        changed = _OtherTokens(self.change, rows, self.is_embedding).delta(read).to_dense()
        changed = changed.T if self.is_embedding else changed
        return (table[rows].double() + changed.double().view_as(table[rows])).to(table.dtype)


def count_rows(model: FineTune, names: Iterable[str]) -> int | None:
    """Return how many rows a model has in some tables of the base; None if it changes none.

    Raises:
        UsageError: Its tables differ in that.
    """
    counts: dict[int, str] = {}
    for name in (name for name in names if name in model.tensors):
        own = own_table(model, name)
        if own is not None:
            counts.setdefault(own.shape[0], name)
        elif isinstance(model, Adapter):
            update = model.updates[name].update
            counts.setdefault(update.change.shape[1 if update.is_embedding else 0], name)
        else:
            counts.setdefault(model.inputs(name)[0].shape[0], name)
    if len(counts) > 1:
        listed = ", ".join(f"{name} has {count}" for count, name in counts.items())
        raise UsageError(
            f"{model.source}: its tables have different numbers of rows ({listed}). Resize them "
            "alike (resize_token_embeddings)."
        )
    return next(iter(counts), None)


def rearranged(model: FineTune, base: Base, names: Iterable[str], rows: Tensor) -> FineTune:
    """Return a model with the rows of its tables in the order of the merged model's tokens.

    Args:
        model: The model.
        base: The base, whose tables are in that order.
        names: Its tables.
        rows: The model's row for each token, (n,) int64; :data:`ABSENT` where it is the base's.

    Raises:
        UsageError: The model is of a kind whose rows cannot be moved.
    """
    changed = [name for name in names if name in model.tensors]
    if not changed:
        return model
    theirs = torch.where(rows == ABSENT, torch.arange(len(rows)), ABSENT)
    tables: dict[str, TensorInfo] = {}
    updates: dict[str, PlacedUpdate] = {}
    for name in changed:
        own, ours = own_table(model, name), base.checkpoint[name]
        if own is not None:
            dtype = torch.promote_types(ours.dtype, own.dtype)
            tables[name] = table(own.name, (ours, own), (theirs, rows), dtype)
        elif isinstance(model, Adapter) and model.updates[name].update.magnitude is None:
            placed = model.updates[name]
            change = _OtherTokens(placed.update.change, rows, placed.update.is_embedding)
            update = replace(placed.update, change=change)
            updates[name] = replace(placed, update=update, shape=ours.shape)
        else:
            raise _immovable(model, name)
    if isinstance(model, Adapter):
        stored = {info.name: info for info in tables.values()}
        return replace(
            model,
            checkpoint=with_tables(model.checkpoint, stored),
            updates={**model.updates, **updates},
        )
    assert isinstance(model, FinetunedModel)
    return replace(model, found={**model.found, **tables})


def _immovable(model: FineTune, name: str) -> UsageError:
    return UsageError(
        f"{model.source} changes {name} in a way whose rows cannot be put in the order of another "
        "tokenizer. Fold it into a full model first, and give that."
    )
