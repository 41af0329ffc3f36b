"""Which tensor of the base a model's name means.

Adapters name a module by its path in the model they were trained in, and full fine-tunes a tensor
by its path in the model that was saved. The base's files may have been saved from its inner model,
or from a larger one around it: then all names differ by one prefix. And transformers renames and
joins tensors of some architectures between the files and the model; it is asked for the names where
those of the files do not match.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from starmerge_models.checkpoints import renaming
from starmerge_models.checkpoints.aside import ask
from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.experts import expert_name, stack_of
from starmerge_models.checkpoints.source import Source
from starmerge_models.errors import StarmergeError
from starmerge_models.storage import Place, local_files

Change = tuple[str, str]
"""A prefix to take away from an adapter's name, and one to put there instead."""

_NONE: Change = ("", "")

_WRAPPER = re.compile(
    r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\."
)
"""What FSDP, torch.compile and activation checkpointing put into the paths of modules."""


def unwrapped(name: str) -> str:
    """Return a tensor's name without what FSDP and others put into it while a model is trained."""
    return _WRAPPER.sub("", name)


def match_names(source: Source, base: Base, names: Sequence[str]) -> dict[str, str]:
    """Find the base's tensors by the names that a model has for them.

    Names are changed by prefixes; see :func:`match_stored`. Where those of the base's files do not
    fit, those in the model, as transformers loads it, are tried.

    Args:
        source: The model, such as an adapter.
        base: The base.
        names: Names of tensors in the model that an adapter was trained in.

    Returns:
        The base's name for each of ``names`` that is found.

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

    All names are changed by the same prefix, if by any: one is taken away, or put before, or parts
    are put into it, as in ``model.`` → ``model.language_model.``. What is then left over, such as
    an output layer outside of the inner model, is found if it fits as it stands. Indices of layers
    are never part of a prefix.

    Args:
        source: The model.
        names: Names of tensors in the model that an adapter was trained in.
        stored: Names to find them by.

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
    """Return all names changed by the prefix by which some were found; as they are if none was.

    Args:
        names: An adapter's names.
        found: What :func:`match_stored` found of them.
    """
    change = prefix_change(*next(iter(found.items()), ("", "")))
    return {each: found.get(each, changed(each, change) or each) for each in names}


def prefix_change(name: str, stored: str) -> Change:
    """Return the prefixes of two names of one tensor, without the parts at the end they share."""
    common = 0
    for ours, theirs in zip(reversed(name.split(".")), reversed(stored.split(".")), strict=False):
        common += len(ours) + 1 if ours == theirs else 0
        if ours != theirs:
            break
    return name[: max(0, len(name) - common + 1)], stored[: max(0, len(stored) - common + 1)]


def changed(name: str, change: Change) -> str | None:
    """Return a name with its prefix changed; None if it has another prefix."""
    return _changed(name, change) if name.startswith(change[0]) else None


def _fitting_changes(name: str, ends: Mapping[str, Sequence[str]]) -> Iterator[Change]:
    """Yield the changes of prefixes by which a name becomes a stored one."""
    for prefix, end in _splits(name):
        for other in ends.get(end, ()):
            if _may_become(prefix, other) and ("." in end or not (prefix and other)):
                yield prefix, other


def _may_become(prefix: str, other: str) -> bool:
    """Tell whether one prefix may stand for another: one has all parts of the other, and more.

    ``model.`` may be ``model.language_model.``, but ``encoder.`` is not ``decoder.``.
    """
    if prefix == other:
        return not prefix  # a longer end of the name says the same
    ours, theirs = Counter(prefix.split(".")[:-1]), Counter(other.split(".")[:-1])
    if ours and theirs and prefix.split(".")[-2] == other.split(".")[-2]:
        return False  # likewise
    return ours <= theirs or theirs <= ours


def _splits(name: str) -> Iterator[Change]:
    """Yield the ways to split a name into a prefix without an index, and its end."""
    parts = name.split(".")
    yield "", name
    for depth in range(1, len(parts)):
        if parts[depth - 1].isdigit():
            break
        yield f"{'.'.join(parts[:depth])}.", ".".join(parts[depth:])


def _ends(names: Iterable[str], stored: Iterable[str]) -> dict[str, list[str]]:
    """Return the prefixes of stored names by the ends that they share with one of ``names``."""
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
    """What transformers makes of a checkpoint's tensors when it loads them."""

    sources: Mapping[str, tuple[str, ...]]
    """For each tensor in the model, by its name, those of the files that make it up, one below the
    other; of joined experts there is one tensor for each. Tensors that are made otherwise, by
    splitting or permuting, are left out."""
    ties: Mapping[str, str]
    """By the name of a tensor in the model that of the other which it is tied to."""
    idle: frozenset[str] = frozenset()
    """Names in the files of tensors that the model computes itself, or does not use."""


def names_in_model(base: Base) -> dict[str, str]:
    """Return the base's tensors by the names they have once transformers has loaded them.

    Tensors that are joined or split on the way have no such name; see :func:`naming_of`.
    """
    return {
        name: stored[0]
        for name, stored in naming_of(base).sources.items()
        if len(stored) == 1 and (stack_of(name) is None or stack_of(stored[0]))
    }


def naming_of(base: Base) -> Naming:
    """Return what transformers makes of a checkpoint's tensors.

    Nothing is known, and the result is empty, where transformers is absent, or older than 5, or
    does not know the model.
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
    """Return what other tensors than the base's own would make up in the model.

    Args:
        base: The base, which says what model it is.
        names: Of tensors as files might hold them, such as those of single experts.

    Returns:
        As :attr:`Naming.sources`.
    """
    config = json.dumps(base.config, sort_keys=True)
    return _asked(base.source.path, config, tuple(names)).sources


@lru_cache(maxsize=8)
def _asked(folder: Place, config: str, names: tuple[str, ...]) -> Naming:
    """Ask transformers for names; the result is kept for the other models of a merge.

    Args:
        folder: The base's.
        config: What its config says; by it, the result is known again.
        names: Of its tensors, in its files.
    """
    with local_files(folder, ["config.json"]) as local:
        answer = ask(renaming, [str(local.absolute()), names])
    if answer is None:
        return Naming({}, {})
    sources = {name: tuple(stored) for name, stored in answer["sources"].items()}
    return Naming(sources, answer["ties"], frozenset(answer["idle"]))
