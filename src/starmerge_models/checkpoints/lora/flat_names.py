"""Names of modules in adapters of diffusion models, with dots and without.

kohya's scripts name a module by the part of the pipeline and its path with underscores instead of
dots: ``lora_unet_mid_block_attentions_0_proj_in``. The dots cannot be restored, because names also
contain underscores; so names are compared without dots.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from starmerge_models.checkpoints.lora.unet_names import makers_name
from starmerge_models.checkpoints.source import Source
from starmerge_models.errors import StarmergeError, UsageError

_PART = re.compile(r"(?P<part>lora_(?:prior_)?[a-z]+\d*|lycoris)_")

_PARTS = {
    "lora_unet": "unet",
    "lora_transformer": "unet",
    "unet": "unet",
    "transformer": "unet",
    "diffusion_model": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
}
"""The part of a pipeline for each prefix of names in kohya's, diffusers' and ComfyUI's layout."""

_RIVALS = {
    "input_blocks": "down_blocks",
    "middle_block": "mid_block",
    "output_blocks": "up_blocks",
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
}
"""Names of layers by the authors of Stable Diffusion and Flux and those of diffusers, both ways."""

_RIVALS |= {ours: theirs for theirs, ours in _RIVALS.items()}


def match_flat(
    source: Source, names: Sequence[str], stored: Collection[str], config: Mapping[str, Any]
) -> dict[str, str]:
    """Match names of weights to a base's tensors without regard to dots.

    The base is one part of a pipeline, and its names may have a prefix that the adapter's lack.

    Args:
        source: The adapter.
        names: Names of weights, such as ``lora_unet_mid_block_attentions_0_proj_in.weight``.
        stored: Names of the base's tensors.
        config: The base's config.

    Returns:
        The base's name for each of the ``names`` that matches, under the prefix with most matches.
        For diffusers' U-Nets, names of their authors match too.

    Raises:
        StarmergeError: A name matches several tensors.
    """
    tensors: dict[str, list[str]] = defaultdict(list)
    for name in stored:
        tensors[_flat(name)].append(name)
    layers = config.get("layers_per_block")
    if isinstance(layers, int):
        for name in stored:
            module, dot, parameter = name.rpartition(".")
            other = makers_name(module, stored, layers)
            if other is not None:
                tensors[_flat(f"{other}{dot}{parameter}")].append(name)
    own = {name: _flat(part_of(name)[1]) for name in names}
    ends = set(own.values())
    votes = Counter(
        prefix for flat in tensors for prefix in _prefixes(flat) if flat[len(prefix) :] in ends
    )
    if not votes:
        return {}
    # Among prefixes with equally many matches, the shortest is preferred.
    best = max(votes, key=lambda prefix: (votes[prefix], -len(prefix)))
    found = {}
    for name, flat in own.items():
        meant = tensors.get(best + flat, [])
        if len(meant) > 1:
            raise StarmergeError(
                f"{source}: {name} may mean {' and '.join(meant)} of the base. Give the adapter in "
                "diffusers' layout, which keeps the dots."
            )
        if meant:
            found[name] = meant[0]
    return found


def match_parts(
    source: Source, names: Sequence[str], known: Iterable[str] | Mapping[str, object]
) -> dict[str, str]:
    """Match the weights of an adapter to those of other adapters, in all layouts.

    Args:
        source: The adapter.
        names: Names of its weights.
        known: Names of the weights of the other adapters.

    Returns:
        The other adapters' name for each of ``names``, or the name itself if they lack it.

    Raises:
        UsageError: The adapters have different naming schemes for the layers of the same model.
        StarmergeError: Two of ``names`` refer to the same weight.
    """
    others = {_key(name): name for name in known}
    _check_spelling(source, names, others)
    found = {name: others.get(_key(name), name) for name in names}
    if len(set(found.values())) < len(names):
        twice = next(name for name, count in Counter(found.values()).items() if count > 1)
        raise StarmergeError(f"{source} holds {twice} twice, in two spellings. Remove one.")
    return found


def _check_spelling(
    source: Source, names: Iterable[str], others: Mapping[tuple[str, str], str]
) -> None:
    """Refuse a mixture of diffusers' and the model authors' names for the same layers."""
    ours, theirs = (
        {kind: name for name in each if (kind := _spelling(name)) is not None}
        for each in (names, others.values())
    )
    for kind, name in ours.items():
        rival = theirs.get(_RIVALS[kind])
        if rival is not None:
            raise UsageError(
                f"{source} changes {name}, and another adapter {rival}: the layers of one model "
                "under the names of its maker, and under those of diffusers. Convert one: load it "
                "with diffusers (load_lora_weights), and save it (save_lora_weights)."
            )


def _spelling(name: str) -> str | None:
    """Return the naming scheme of a denoiser's layers that a name belongs to; None if unknown."""
    rest = _flat(part_of(name)[1])
    return next((kind for kind in _RIVALS if rest.startswith(f"{kind}_")), None)


def part_of(name: str) -> tuple[str, str]:
    """Split a name into its part of a pipeline and the rest."""
    head, dot, rest = name.partition(".")
    if dot and head in _PARTS:
        return _PARTS[head], rest
    match = _PART.match(name)
    if match is None:
        return "", name
    return _PARTS.get(match["part"], match["part"]), name[match.end() :]


def flattened(names: Sequence[str]) -> list[str]:
    """Return the names of modules in kohya's notation.

    Names of a pipeline's first text encoder begin with ``lora_te1`` if there are two encoders, else
    with ``lora_te``. Names without a part belong to the denoiser.

    Args:
        names: Names of modules, with dots or in kohya's notation.
    """
    parts = [part_of(name) for name in names]
    has_two = any(part == "text_encoder_2" for part, _ in parts)
    heads = {
        "": "lora_unet",
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if has_two else "lora_te",
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
    }
    return [
        name if "." not in name and _PART.match(name) else f"{heads[part]}_{rest.replace('.', '_')}"
        for name, (part, rest) in zip(names, parts, strict=True)
    ]


def _key(name: str) -> tuple[str, str]:
    part, rest = part_of(name)
    return part, _flat(rest)


def _flat(name: str) -> str:
    """Return a weight's name with underscores instead of dots, except for the last dot."""
    module, dot, parameter = name.rpartition(".")
    return f"{module.replace('.', '_')}{dot}{parameter}"


def _prefixes(flat: str) -> Iterable[str]:
    """Yield the possible prefixes of a flat name before the module's own name."""
    yield ""
    for match in re.finditer("_", flat):
        yield flat[: match.end()]
