"""Which tensor of the base an adapter's name means.

Adapters name a module by its path in the model they were trained in. The base's files may have been
saved from its inner model, or from a larger one around it: then all names differ by one prefix. And
transformers renames tensors of some architectures between the files and the model; it is asked for
the names where those of the files do not match.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from starmerge.checkpoints.base import Base
from starmerge.checkpoints.source import Source
from starmerge.errors import StarmergeError

_Change = tuple[str, str]
"""A prefix to take away from an adapter's name, and one to put there instead."""

_NONE: _Change = ("", "")


def match_names(source: Source, base: Base, names: Sequence[str]) -> dict[str, str]:
    """Find the base's tensors by the names that an adapter has for them.

    All names are changed by the same prefix, if by any. A name that fits as it stands needs no
    change; indices of layers are never part of a prefix.

    Args:
        source: The adapter.
        base: The base.
        names: Names of tensors in the model that the adapter was trained in.

    Returns:
        The base's name for each of ``names`` that is found under the best prefix.

    Raises:
        StarmergeError: Several prefixes fit all names.
    """
    found = match_stored(source, names, {name: name for name in base.checkpoint})
    if len(found) < len(names):
        in_model = match_stored(source, names, _names_in_model(base))
        if len(in_model) > len(found):
            return in_model
    return found


def match_stored(source: Source, names: Sequence[str], stored: dict[str, str]) -> dict[str, str]:
    """Match ``names`` against the keys of ``stored``, return its values; see :func:`match_names`.

    Args:
        source: The adapter.
        names: Names of tensors in the model that the adapter was trained in.
        stored: Names to find them by.
    """
    longer = _longer_names(set(names), stored)
    votes = Counter(
        change for name in names for change in _fitting_changes(name, stored, longer[name])
    )
    if not votes:
        return {}
    most = max(votes.values())
    best = [change for change in votes if votes[change] == most]
    if _NONE in best:
        best = [_NONE]
    if len(best) > 1 and most == len(names):
        choices = " and ".join(_changed(names[0], change) for change in best[:2])
        raise StarmergeError(
            f"{source}: {names[0]} may mean {choices} of the base. Rename the adapter's tensors "
            "to the full names of the base's."
        )
    changed = {name: _changed(name, best[0]) for name in names}
    return {
        name: stored[other]
        for name, other in changed.items()
        if name.startswith(best[0][0]) and other in stored
    }


def completed(names: Sequence[str], found: Mapping[str, str]) -> dict[str, str]:
    """Return all names changed by the prefix by which some were found; as they are if none was.

    Args:
        names: An adapter's names.
        found: What :func:`match_stored` found of them.
    """
    name, stored = next(iter(found.items()), ("", ""))
    common = 0
    for ours, theirs in zip(reversed(name.split(".")), reversed(stored.split(".")), strict=False):
        common += len(ours) + 1 if ours == theirs else 0
        if ours != theirs:
            break
    change = name[: max(0, len(name) - common + 1)], stored[: max(0, len(stored) - common + 1)]
    return {
        each: found.get(each, _changed(each, change) if each.startswith(change[0]) else each)
        for each in names
    }


def _fitting_changes(
    name: str, stored: Collection[str], longer: Sequence[str]
) -> Iterator[_Change]:
    if name in stored:
        yield _NONE
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if parts[depth - 1].isdigit():
            break
        if ".".join(parts[depth:]) in stored:
            yield f"{'.'.join(parts[:depth])}.", ""
    for other in longer:
        yield "", other.removesuffix(name)


def _changed(name: str, change: _Change) -> str:
    return change[1] + name.removeprefix(change[0])


def _longer_names(names: Collection[str], stored: Collection[str]) -> dict[str, list[str]]:
    """Return, for each name, the stored ones that end with it behind a prefix."""
    longer: dict[str, list[str]] = defaultdict(list)
    for other in stored:
        parts = other.split(".")
        for depth in range(1, len(parts)):
            if parts[depth - 1].isdigit():
                break
            end = ".".join(parts[depth:])
            if end in names:
                longer[end].append(other)
    return longer


def _names_in_model(base: Base) -> dict[str, str]:
    """Return the base's tensors by the names they have once transformers has loaded them.

    Tensors that are joined or split on the way have no such name. Nothing is known, and the result
    is empty, where transformers is absent, or older than 5, or does not know the model.
    """
    try:
        import torch  # noqa: PLC0415
        import transformers  # noqa: PLC0415  (slow to import, rarely needed)
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
        from transformers.core_model_loading import (  # noqa: PLC0415
            WeightConverter,
            rename_source_key,
        )

        config = transformers.AutoConfig.from_pretrained(
            base.source.path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
        changes = get_model_conversion_mapping(model)
        converters = [change for change in changes if isinstance(change, WeightConverter)]
        renamings = [change for change in changes if not isinstance(change, WeightConverter)]
        renamed = {name: rename_source_key(name, renamings, converters) for name in base.checkpoint}
    except (ImportError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError):
        return {}
    taken = Counter(name for name, _ in renamed.values())
    return {
        name: stored
        for stored, (name, converter) in renamed.items()
        if converter is None and taken[name] == 1
    }
