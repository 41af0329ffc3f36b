"""Token tables, and the reordering of their rows for another tokenizer.

Models with different tokenizers have different rows for the same token. Before such tables are
subtracted and merged, the rows of each are reordered to the tokens of the merged model.
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
"""Row number of a token that a table lacks."""


@dataclass(frozen=True, eq=False)
class TokenRows:
    """A table whose rows are gathered from several tables.

    A row that several tables have is their mean, computed in float64; a row that no table has is
    the mean of all rows of the first table, as for untrained tokens. Rows of a single table are
    copied exactly, up to a change of dtype.

    Args:
        rows: For each table the number of its row for each token, (n,) int64; :data:`ABSENT` for
            none.
        dtype: Dtype of the result.
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
    """The change of a table with its rows reordered to other tokens; absent rows do not change."""

    change: Change
    rows: Tensor
    """The row of the original change for each token, (n,) int64; :data:`ABSENT` for none."""
    is_embedding: bool
    """Whether the table is the transpose of the change."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the stored tensors."""
        return self.change.keys

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, in) or, of an embedding, (out, n)."""
        n, own = len(self.rows), self.change.shape
        return (own[0], n) if self.is_embedding else (n, *own[1:])

    @property
    def rank(self) -> int | None:
        """The rank of the original change."""
        return self.change.rank

    def delta(self, read: Read) -> Delta:
        """Return the change, with zeros for absent rows."""
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
    """Return rows of several tables as one lazy tensor; see :class:`TokenRows`.

    Args:
        name: Name of the new tensor.
        parts: The tables, which differ at most in their number of rows.
        rows: For each table its rows, (n,) int64.
        dtype: Dtype of the new tensor.
    """
    shape = (len(rows[0]), *parts[0].shape[1:])
    return Derived(name, dtype, shape, parts[0].file, tuple(parts), TokenRows(tuple(rows), dtype))


def with_tables(checkpoint: Checkpoint, tables: Mapping[str, TensorInfo]) -> Checkpoint:
    """Return a checkpoint with some of its entries replaced, in the same order."""
    return checkpoint.viewed(tables.get(name, info) for name, info in checkpoint.items())


def without_tables(model: FinetunedModel, names: Collection[str]) -> FinetunedModel:
    """Return a fine-tune that does not change some of the base's tables."""
    return replace(model, found={n: info for n, info in model.found.items() if n not in names})


def own_table(model: FineTune, name: str) -> TensorInfo | None:
    """Return a model's whole table for a tensor of the base; None if it has none."""
    if isinstance(model, FinetunedModel):
        return model.found.get(name)
    if isinstance(model, Adapter) and name in model.replacements:
        return model.checkpoint[model.replacements[name]]
    return None


def _copied_table(model: FineTune, name: str) -> TensorInfo | None:
    """Return an adapter's copy of the base's table, if it has one of another size."""
    if isinstance(model, Adapter) and name in model.copies:
        return model.checkpoint[model.copies[name]]
    return None


def donor_rows(
    model: FineTune, base: Base, name: str, numbers: Sequence[int]
) -> tuple[TensorInfo, list[int]]:
    """Return a table with given rows of a model's token table, and their numbers in it.

    A model that does not change the tensor has the rows of the base, or of its copy of the table.

    Args:
        model: The model, with rows in the order of its own tokenizer.
        base: The base, with rows in the order of its own tokenizer.
        name: The tensor.
        numbers: The model's rows.

    Returns:
        A table, and the number of each row in it; :data:`ABSENT` if the row does not exist.
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
    """Rows of a table with an adapter's change added.

    Args:
        change: The change; for an embedding, the transpose of the table's change.
        rows: Numbers of the rows, (k,) int64; :data:`ABSENT` for arbitrary rows.
        is_embedding: Whether the table is that of an embedding.
    """

    change: Change
    rows: Tensor
    is_embedding: bool

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return the rows, (k, …), from the table and the stored tensors of the change."""
        table, *stored = parts
        read = dict(zip(self.change.keys, stored, strict=True)).__getitem__
        rows = self.rows.clamp(min=0)
        changed = _OtherTokens(self.change, rows, self.is_embedding).delta(read).to_dense()
        changed = changed.T if self.is_embedding else changed
        return (table[rows].double() + changed.double().view_as(table[rows])).to(table.dtype)


def count_rows(model: FineTune, names: Iterable[str]) -> int | None:
    """Return the number of rows of a model's token tables; None if it changes none of them.

    Raises:
        UsageError: The tables have different numbers of rows.
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
    """Return a model with the rows of its tables reordered to the merged model's tokens.

    Args:
        model: The model.
        base: The base, whose tables are in that order.
        names: Names of the tables.
        rows: The model's row for each token, (n,) int64; :data:`ABSENT` for the base's row.

    Raises:
        UsageError: The model is of a kind whose rows cannot be reordered.
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
