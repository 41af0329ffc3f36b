"""Short names of modules for tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from starmerge_models.checkpoints.layers import family_of, layer_of


def module_names(names: Iterable[str]) -> dict[str, str]:
    """Return a short module name for each tensor's name, the same in all layers.

    ``model.layers.3.self_attn.q_proj.weight`` becomes ``q_proj``, or longer if that is not unique;
    in models with several stacks of layers the stack's name is prepended: ``encoder:
    SelfAttention.q``.
    """
    names = list(names)
    families = {name: family_of(name) for name in names}
    stacks = _stacks(sorted({family for family in families.values() if family}))
    rests = {name: _rest(name) for name in names}
    found: dict[str, str] = {}
    for family in set(families.values()):
        own = [name for name in names if families[name] == family]
        short = _shortest({rests[name] for name in own})
        before = f"{stacks[family]}: " if len(stacks) > 1 and family else ""
        found |= {name: before + short[rests[name]] for name in own}
    return {name: found[name] for name in names}


def _rest(name: str) -> str:
    """Return a name without its layer prefix and without a trailing ``weight``."""
    rest = name.removeprefix(layer_of(name)).removeprefix(".") if family_of(name) else name
    return rest.removesuffix(".weight") or name


def _stacks(families: Sequence[str]) -> Mapping[str, str]:
    """Return for each family of layers its first word, or its full name if that is not unique."""
    words = [family.split(".")[0] for family in families]
    return {
        family: word if words.count(word) == 1 else family
        for family, word in zip(families, words, strict=True)
    }


def _shortest(paths: Iterable[str]) -> dict[str, str]:
    """Return for each path its shortest unique suffix of parts."""
    split = {path: path.split(".") for path in paths}
    found = {}
    for path, parts in split.items():
        for count in range(1, len(parts) + 1):
            end = parts[-count:]
            if sum(other[-count:] == end for other in split.values()) == 1:
                break
        found[path] = ".".join(end)
    return found
