"""Matching of tensor names between models and the base.

Adapters name a module by its path in the trained model, and full fine-tunes a tensor by its path in
the saved model. The base's files may have been saved from its inner model, or from a larger model
around it: then all names differ by one prefix. For some architectures transformers also renames and
joins tensors when it loads the files. If the names of the files do not match, transformers' names
are used.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from starmerge_models.checkpoints import renaming
from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.experts import expert_name, stack_of
from starmerge_models.checkpoints.isolated import call_isolated
from starmerge_models.checkpoints.source import Source
from starmerge_models.errors import StarmergeError
from starmerge_models.storage import Place, local_files

Change = tuple[str, str]
"""A prefix to remove from an adapter's name, and the prefix to put in its place."""

_NONE: Change = ("", "")

_WRAPPER = re.compile(
    r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\."
)
"""Parts that FSDP, torch.compile and activation checkpointing insert into the paths of modules."""


def unwrapped(name: str) -> str:
    """Return a tensor's name without the parts that FSDP and other wrappers insert."""
    return _WRAPPER.sub("", name)


def match_names(source: Source, base: Base, names: Sequence[str]) -> dict[str, str]:
    """Match a model's names of tensors to the base's.

    Names are matched up to a prefix; see :func:`match_stored`. If the names in the base's files do
    not fit, those of the model that transformers loads are tried.

    Args:
        source: The model, such as an adapter.
        base: The base.
        names: Names of tensors in the model on which an adapter was trained.

    Returns:
        The base's name for each of the ``names`` that matches.

    Raises:
        StarmergeError: Several prefixes fit all names.
    """
    found = match_stored(source, names, {name: name for name in base.checkpoint})
    if len(found) < len(names):
        in_model = match_stored(source, names, names_in_model(base))
        if len(in_model) > len(found):
            return in_model
    return found


def match_stored(source: Source, names: Sequence[str], stored: Mapping[str, str]) -> dict[str, str]:
    """Match ``names`` against the keys of ``stored``, return its values; see :func:`match_names`.

    The same change of the prefix, if any, is applied to all names: a prefix is removed, added, or
    extended, as in ``model.`` → ``model.language_model.``. Remaining names, such as that of an
    output layer outside of the inner model, match if they are equal. Layer indices are never part
    of a prefix.

    Args:
        source: The model.
        names: Names of tensors in the model on which an adapter was trained.
        stored: The result for each stored name.

    Raises:
        StarmergeError: Several prefixes fit all names.
    """
    ends = _ends(names, stored)
    votes = Counter(change for name in names for change in _fitting_changes(name, ends))
    if not votes:
        return {}
    most = max(votes.values())
    simplest = min(sum(map(bool, change)) for change in votes if votes[change] == most)
    best = [c for c in votes if votes[c] == most and sum(map(bool, c)) == simplest]
    if len(best) > 1 and most == len(names):
        choices = " and ".join(_changed(names[0], change) for change in best[:2])
        raise StarmergeError(
            f"{source}: {names[0]} may mean {choices} of the base. Rename the adapter's tensors "
            "to the full names of the base's."
        )
    found = {n: other for n in names if (other := changed(n, best[0])) in stored and other}
    taken = set(found.values())
    found |= {name: name for name in names if name not in found and name in stored.keys() - taken}
    return {name: stored[other] for name, other in found.items()}


def completed(names: Sequence[str], found: Mapping[str, str]) -> dict[str, str]:
    """Apply the prefix change of the matched names to all names; unchanged if none matched.

    Args:
        names: An adapter's names.
        found: The result of :func:`match_stored`.
    """
    change = prefix_change(*next(iter(found.items()), ("", "")))
    return {each: found.get(each, changed(each, change) or each) for each in names}


def prefix_change(name: str, stored: str) -> Change:
    """Return the prefixes of two names of one tensor, without their common suffix."""
    common = 0
    for ours, theirs in zip(reversed(name.split(".")), reversed(stored.split(".")), strict=False):
        common += len(ours) + 1 if ours == theirs else 0
        if ours != theirs:
            break
    return name[: max(0, len(name) - common + 1)], stored[: max(0, len(stored) - common + 1)]


def changed(name: str, change: Change) -> str | None:
    """Return a name with a changed prefix; None if it has another prefix."""
    return _changed(name, change) if name.startswith(change[0]) else None


def _fitting_changes(name: str, ends: Mapping[str, Sequence[str]]) -> Iterator[Change]:
    """Yield the changes of the prefix that turn a name into a stored name."""
    for prefix, end in _splits(name):
        for other in ends.get(end, ()):
            if _may_become(prefix, other) and ("." in end or not (prefix and other)):
                yield prefix, other


def _may_become(prefix: str, other: str) -> bool:
    """Return whether one prefix contains all parts of the other.

    ``model.`` may become ``model.language_model.``, but ``encoder.`` not ``decoder.``.
    """
    if prefix == other:
        return not prefix  # a longer suffix gives the same change
    ours, theirs = Counter(prefix.split(".")[:-1]), Counter(other.split(".")[:-1])
    if ours and theirs and prefix.split(".")[-2] == other.split(".")[-2]:
        return False  # a longer suffix gives the same change
    return ours <= theirs or theirs <= ours


def _splits(name: str) -> Iterator[Change]:
    """Yield all splits of a name into a prefix without a layer index, and a suffix."""
    parts = name.split(".")
    yield "", name
    for depth in range(1, len(parts)):
        if parts[depth - 1].isdigit():
            break
        yield f"{'.'.join(parts[:depth])}.", ".".join(parts[depth:])


def _ends(names: Iterable[str], stored: Iterable[str]) -> dict[str, list[str]]:
    """Return the prefixes of stored names, by the suffixes that they share with ``names``."""
    wanted = {end for name in names for _, end in _splits(name)}
    found: dict[str, list[str]] = defaultdict(list)
    for other in stored:
        for prefix, end in _splits(other):
            if end in wanted:
                found[end].append(prefix)
    return found


def _changed(name: str, change: Change) -> str:
    return change[1] + name.removeprefix(change[0])


@dataclass(frozen=True)
class Naming:
    """The mapping between a checkpoint's tensors and those of the model that transformers loads."""

    sources: Mapping[str, tuple[str, ...]]
    """For each tensor of the model, by name, the stored tensors whose concatenation along the first
    dimension it is; joined experts have one entry each. Tensors that are split or permuted are left
    out."""
    ties: Mapping[str, str]
    """For each tied tensor of the model, by name, the name of the tensor to which it is tied."""
    idle: frozenset[str] = frozenset()
    """Stored names of tensors that the model computes itself, or does not use."""


def names_in_model(base: Base) -> dict[str, str]:
    """Return the base's tensors by their names in the model that transformers loads.

    Tensors that are joined or split when loaded are left out; see :func:`naming_of`.
    """
    return {
        name: stored[0]
        for name, stored in naming_of(base).sources.items()
        if len(stored) == 1 and (stack_of(name) is None or stack_of(stored[0]))
    }


def naming_of(base: Base) -> Naming:
    """Return the mapping of a checkpoint's tensors to those of transformers' model.

    The result is empty if transformers is not installed, is older than 5, or does not know the
    model, and if the base's config names no architecture.
    """
    # Joined experts have one name in the file.
    experts: dict[str, list[str]] = {}
    for name in base.checkpoint:
        joined = stack_of(name)
        experts.setdefault(joined[0] if joined else name, []).append(name)
    config = json.dumps(base.config, sort_keys=True)
    answer = _asked(base.source.path, config, tuple(experts))
    sources: dict[str, tuple[str, ...]] = {}
    for name, stored in answer.sources.items():
        if len(stored) == 1 and stack_of(experts[stored[0]][0]):
            own = experts[stored[0]]
            sources |= {expert_name(name, number): (each,) for number, each in enumerate(own)}
        else:
            sources[name] = stored
    return Naming(sources, answer.ties, answer.idle)


def made_of(base: Base, names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Return the mapping for stored tensors other than the base's own.

    Args:
        base: The base, whose config determines the model.
        names: Names of stored tensors, such as those of single experts.

    Returns:
        As :attr:`Naming.sources`.
    """
    config = json.dumps(base.config, sort_keys=True)
    return _asked(base.source.path, config, tuple(names)).sources


@lru_cache(maxsize=8)
def _asked(folder: Place, config: str, names: tuple[str, ...]) -> Naming:
    """Call transformers for the mapping; the result is cached for the other models of a merge.

    Args:
        folder: The base's folder.
        config: The content of its config, a part of the cache key.
        names: Names of the tensors in its files.
    """
    if not json.loads(config).get("architectures"):
        return Naming({}, {})  # the architecture is the class whose tensors transformers names
    with local_files(folder, ["config.json"]) as local:
        answer = call_isolated(renaming, [str(local.absolute()), names])
    if answer is None:
        return Naming({}, {})
    sources = {name: tuple(stored) for name, stored in answer["sources"].items()}
    return Naming(sources, answer["ties"], frozenset(answer["idle"]))
