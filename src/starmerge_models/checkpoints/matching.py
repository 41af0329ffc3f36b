"""Matching of a full fine-tune's tensors to the base's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.names import completed, match_stored, naming_of, unwrapped
from starmerge_models.checkpoints.source import Source
from starmerge_models.checkpoints.tensors import TensorInfo, joined, read_tensor, stored_of

_RECOMPUTED = re.compile(
    r"(.*\.)?((\w+_)?inv_freq|rotary_emb\.(cos|sin)_cached|freqs_cis|position_ids"
    r"|token_type_ids|relative_position_index|attn\.masked_bias|attention\.masked_bias)"
)
"""Names of buffers that a model computes when it is created; only old files contain them."""

_MASK = re.compile(r"(.*\.)?(attn|attention)\.bias")
"""Names of causal masks (four dimensions) and of biases (one dimension)."""


_LOGITS_BIAS = re.compile(r"(.*\.)?final_logits_bias")
"""Names of the buffers that BART-like models add to the logits."""


@dataclass(frozen=True)
class Match:
    """The result of matching, without buffers that models compute themselves."""

    found: dict[str, TensorInfo]
    """The fine-tune's tensors, by the base's names."""
    lacking: tuple[str, ...]
    """Names of the base's tensors that the fine-tune lacks."""
    excess: tuple[str, ...]
    """Names of the fine-tune's tensors that the base lacks."""
    untied: str | None
    """The base's name of the output layer, if the base ties it to the embedding and the fine-tune
    does not."""


def match(source: Source, own: Base, base: Base) -> Match:
    """Match a fine-tune's tensors to the base's.

    They are matched by name, as in :func:`match_stored`; if the names in the files do not fit, by
    transformers' names, which are the same for joined and for single experts. A tied output layer
    is identified with the embedding, whether it is stored or not, and duplicates of tied tensors
    are ignored.

    Args:
        source: The fine-tune.
        own: The opened fine-tune.
        base: The base.

    Raises:
        StarmergeError: A name matches several of the base's tensors.
    """
    own = _unwrapped(own)
    theirs = {name: own.checkpoint[name] for name in weights_of(own)}
    tied = {name for name in own.tied if _is_like_embedding(own, name)}
    embedding = None if own.embedding is None else own.checkpoint[own.embedding]
    if embedding is not None:
        theirs |= dict.fromkeys(tied, embedding)
    found = _by_name(source, own, base, theirs)
    has_embedding = any(info is embedding for info in found.values())
    for tensor in base.token_tables:
        if tensor in found:
            continue
        if tied and has_embedding and embedding is not None and tensor in base.token_matrices:
            found[tensor] = embedding
        elif twin := _equal_table(base, tensor, found):
            found[tensor] = found[twin]
    head, untied = _untied_head(own, base, found) or (None, None)
    used = {(info.file, info.name) for info in stored_of(found.values())}
    excess = tuple(
        name
        for name, info in theirs.items()
        if not (head and name.rpartition(".")[0] == head.rpartition(".")[0])
        and not used.issuperset((part.file, part.name) for part in info.stored)
        and not _equal_table(own, name, theirs)
    )
    lacking = tuple(name for name in weights_of(base) if name not in found)
    if excess:
        excess = _without_idle(own, excess)
    if lacking:
        lacking = _without_idle(base, lacking)
    return Match(found, lacking, excess, untied)


def _unwrapped(model: Base) -> Base:
    """Return a model with the names of its tensors without those of training wrappers."""
    names = {name: unwrapped(name) for name in model.checkpoint}
    if all(name == plain for name, plain in names.items()):
        return model
    renamed = (model.checkpoint[name].renamed(plain) for name, plain in names.items())
    return replace(model, checkpoint=model.checkpoint.viewed(renamed))


def _without_idle(model: Base, names: Iterable[str]) -> tuple[str, ...]:
    """Return a model's tensors without those that transformers does not use.

    An output bias of zeros is equivalent to no bias and is left out too.
    """
    idle = naming_of(model).idle
    return tuple(
        name
        for name in names
        if name not in idle
        and not (_LOGITS_BIAS.fullmatch(name) and not read_tensor(model.checkpoint[name]).any())
    )


def weights_of(model: Base) -> list[str]:
    """Return the names of a model's tensors, without buffers that the model computes itself."""
    return [name for name in model.checkpoint if not is_recomputed(model, name)]


def is_recomputed(model: Base, name: str) -> bool:
    """Return whether a tensor is a buffer that models of its kind compute when created."""
    is_mask = _MASK.fullmatch(name) and len(model.checkpoint[name].shape) == 4
    return bool(is_mask or _RECOMPUTED.fullmatch(name))


def in_words(names: Sequence[str], others: Iterable[str]) -> str:
    """Return a text of names of tensors, grouped by modules: cls.* (3 tensors).

    Args:
        names: The tensors.
        others: Names of other tensors, which the groups must not contain.
    """
    taken = {part for name in others for part in _parents(name)}
    parts: dict[str, list[str]] = {}
    for name in names:
        part = next((parent for parent in _parents(name) if parent not in taken), name)
        parts.setdefault(part, []).append(name)
    shared = [f"{p}.* ({len(own)} tensors)" if own[1:] else own[0] for p, own in parts.items()]
    return ", ".join(shared[:5]) + (f" and {len(shared) - 5} more" if len(shared) > 5 else "")


def _parents(name: str) -> list[str]:
    """Return the parent modules of a tensor, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _by_name(
    source: Source, own: Base, base: Base, theirs: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Return a fine-tune's tensors by the base's names, matched by the names in the files."""
    ours = weights_of(base)
    pairs = match_stored(source, list(theirs), {name: name for name in ours})
    found = {tensor: theirs[name] for name, tensor in pairs.items()}
    if len(pairs) in (len(theirs), len(ours)):
        return found
    in_model = _by_name_in_model(source, own, base)
    return in_model if len(in_model) > len(found) else found


def _by_name_in_model(source: Source, own: Base, base: Base) -> dict[str, TensorInfo]:
    """Return a fine-tune's tensors by the base's names, matched by transformers' names."""
    theirs, ours = naming_of(own).sources, naming_of(base).sources
    found: dict[str, TensorInfo] = {}
    for name, stored in match_stored(source, list(theirs), {n: n for n in ours}).items():
        parts = [own.checkpoint[part] for part in theirs[name]]
        found |= zip(ours[stored], _divided(parts, base, ours[stored]), strict=True)
    return found


def _divided(parts: Sequence[TensorInfo], base: Base, names: Sequence[str]) -> Sequence[TensorInfo]:
    """Split the concatenation of tensors into tensors of the shapes of the base's.

    Args:
        parts: The tensors, which are concatenated along the first dimension.
        base: The base.
        names: The base's tensors whose concatenation has the same rows.
    """
    if len(parts) == len(names):
        return parts
    whole = joined(parts[0].name, parts)
    if len(names) == 1:
        return [whole]
    divided, start = [], 0
    for name in names:
        stop = min(start + base.checkpoint[name].shape[0], whole.shape[0])
        divided.append(whole.rows(name, start, stop))
        start = stop
    return divided


def _is_like_embedding(model: Base, name: str) -> bool:
    embedding = model.embedding
    return embedding is not None and (
        model.checkpoint[name].shape == model.checkpoint[embedding].shape
    )


def _equal_table(model: Base, name: str, others: Iterable[str]) -> str | None:
    """Return another token table of a model with the same values; None if there is none."""
    if name not in model.token_tables:
        return None
    info = model.checkpoint[name]
    for other in model.token_tables:
        twin = model.checkpoint[other]
        if (
            other != name
            and other in others
            and (twin.shape, twin.dtype) == (info.shape, info.dtype)
            and torch.equal(read_tensor(twin), read_tensor(info))
        ):
            return other
    return None


def _untied_head(own: Base, base: Base, found: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """Return the untied output layer of a fine-tune whose base ties it.

    Returns:
        The fine-tune's name and the base's name of the layer; None if it equals the embedding.
    """
    if not base.tied or own.tied or own.embedding is None:
        return None
    embedding = read_tensor(own.checkpoint[own.embedding])
    for name in own.token_matrices:
        is_end = (
            name != own.embedding
            and not own.is_lookup_table(name)
            and _is_like_embedding(own, name)
        )
        if is_end and not torch.equal(read_tensor(own.checkpoint[name]), embedding):
            pairs = {info.name: tensor for tensor, info in found.items()}
            return name, pairs.get(name) or completed([name], pairs)[name]
    return None
