"""Adapters of models whose output layer is tied to the embedding.

Equal changes of both tensors are a change of the tied weight. If an adapter changes only one of
them, PEFT's forward pass uses the change for this one only, although its merge_and_unload changes
both. The merged model then has two separate tensors, unless the adapter ties them
(``ensure_weight_tying``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.lora.adapter import Adapter, PlacedUpdate
from starmerge_models.checkpoints.lora.formats import AdapterContents
from starmerge_models.checkpoints.lora.update import Update
from starmerge_models.checkpoints.names import completed, naming_of
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import StarmergeError

_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
"""Suffixes of the names of transformers' classes whose output layer is called lm_head."""


def ends_of(base: Base) -> list[str]:
    """Return the base's tensors that are, or were before this merge, tied to the embedding."""
    if base.tied:
        return base.tied
    return [base.embedding, base.head] if base.head and base.embedding else []


def head_not_stored(base: Base, contents: AdapterContents, found: Mapping[str, str]) -> str | None:
    """Return the adapter's name of an output layer that it changes and the base does not store.

    Args:
        base: The base.
        contents: What the adapter holds.
        found: The base's names for the adapter's.
    """
    if not base.tied or base.embedding is None:
        return None
    embedding = base.embedding
    changed = {update.weight: update.change.shape for update in contents.updates}
    changed |= {name: contents.checkpoint[key].shape for name, key in contents.saved.items()}
    left = [n for n, shape in changed.items() if n not in found and base.fits(embedding, shape)]
    return left[0] if len(left) == 1 else None


def with_tied_ends(
    adapter: Adapter,
    base: Base,
    contents: AdapterContents,
    found: Mapping[str, str],
    head: str | None,
) -> Adapter:
    """Return an adapter with one change for all tied tensors, or with the tensor that it unties.

    Args:
        adapter: The adapter, without its change of an output layer that is not stored.
        base: The base.
        contents: What the adapter holds.
        found: The base's names for the adapter's.
        head: Its name of an output layer that is changed and not stored.

    Raises:
        StarmergeError: The adapter ties both ends, and changes them differently.
    """
    ends = ends_of(base)
    changed = [end for end in ends if end in adapter.tensors]
    if base.embedding is None or not (changed or head):
        return adapter

    def change_of(end: str) -> Update | str:
        return adapter.replacements.get(end) or adapter.updates[end].update

    read = adapter.checkpoint.read
    first = change_of(changed[0]) if changed else None
    if head is not None:
        by_weight = {update.weight: update for update in contents.updates}
        own = contents.saved.get(head) or by_weight[head]
        if first is None and contents.config.ties:
            return _with_ends(adapter, base, [base.embedding], own)
        if first is not None and are_equal(first, own, read):
            return adapter
        if first is not None and contents.config.ties:
            raise _differ(adapter, [changed[0], head])
        return replace(adapter, untied=name_of_head(base, head, found))
    assert first is not None, "some end is changed"
    is_one = all(are_equal(first, change_of(end), read) for end in changed[1:])
    if is_one and (contents.config.ties or (len(changed) == len(ends) > 1)):
        return _with_ends(adapter, base, [end for end in ends if end not in changed], first)
    if base.tied and contents.config.ties and not is_one:
        raise _differ(adapter, changed)
    return replace(adapter, untied=name_of_head(base, None, found) if base.tied else None)


def _differ(adapter: Adapter, ends: Iterable[str]) -> StarmergeError:
    return StarmergeError(
        f"{adapter.source} changes {' and '.join(ends)} differently, and says that it ties them "
        "(ensure_weight_tying in adapter_config.json). If the two were trained apart, set the key "
        "to false."
    )


def _with_ends(adapter: Adapter, base: Base, ends: Iterable[str], change: Update | str) -> Adapter:
    """Return an adapter that applies the same change to more of the tied tensors."""
    updates, replacements = dict(adapter.updates), dict(adapter.replacements)
    for end in ends:
        if isinstance(change, str):
            replacements[end] = change
        else:
            shape = base.checkpoint[end].shape
            updates[end] = PlacedUpdate(change, shape, change.is_embedding)
    return replace(adapter, updates=updates, replacements=replacements)


def name_of_head(base: Base, name: str | None, found: Mapping[str, str]) -> str | None:
    """Return the name of the output layer in the merge; None if the base has none.

    Args:
        base: The base, whose embedding stands for both ends.
        name: The adapter's name for it, if it has one.
        found: The base's names for the adapter's.

    Raises:
        StarmergeError: It is not known what the model calls it.
    """
    if name is not None:
        return completed([name], found)[name]
    others = [end for end in base.tied if end != base.embedding]
    if others:
        return others[0]
    naming = naming_of(base)
    for end, other in naming.ties.items():
        # Some models, such as BERT, tie biases, too.
        if naming.sources.get(other) == (base.embedding,):
            return end
        if naming.sources.get(end) == (base.embedding,):
            return other
    if naming.sources:
        return None  # transformers knows the model, and ties nothing in it
    if str((base.config.get("architectures") or [""])[0]).endswith(_LANGUAGE_MODELS):
        return "lm_head.weight"
    raise StarmergeError(
        f"{base.source} ties {base.embedding} to its output layer (tie_word_embeddings in "
        "config.json), and what that is called is not known. Install transformers 5 or later, "
        "which knows; or set the key to false, if the model puts out no tokens."
    )


def are_equal(first: Update | str, second: Update | str, read: Callable[[str], Tensor]) -> bool:
    """Return whether two changes of a table are equal.

    Args:
        first: An update, or the key of the whole table.
        second: Another update or key.
        read: Returns a stored tensor by its key.
    """
    if isinstance(first, str) and isinstance(second, str):
        return torch.equal(read(first), read(second))
    if isinstance(first, str) or isinstance(second, str):
        return False
    deltas = []
    for update in (first, second):
        delta = update.change.delta(read)
        if isinstance(delta, Dense) or update.magnitude:
            return False
        turned = LowRank(delta.A.T, delta.B.T, delta.scale)
        deltas.append(turned if update.is_embedding else delta)
    one, other = deltas
    is_same = torch.equal(one.B, other.B) and torch.equal(one.A, other.A)
    return is_same and one.scale == other.scale
