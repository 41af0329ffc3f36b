"""Names of modules in adapters of diffusion models, with dots and without.

kohya's scripts call a module by its path with underscores in place of dots, behind the part of the
pipeline it lies in: ``lora_unet_mid_block_attentions_0_proj_in``. Dots cannot be put back, since
names hold underscores of their own; so names are compared without them.
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
"""A part of a pipeline, by what names in kohya's, diffusers' and ComfyUI's layout begin with."""

_RIVALS = {
    "input_blocks": "down_blocks",
    "middle_block": "mid_block",
    "output_blocks": "up_blocks",
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
}
"""What the makers of Stable Diffusion and Flux call layers, and what diffusers does; both ways."""

_RIVALS |= {ours: theirs for theirs, ours in _RIVALS.items()}


def match_flat(
    source: Source, names: Sequence[str], stored: Collection[str], config: Mapping[str, Any]
) -> dict[str, str]:
    """Find a base's tensors by names without dots, or as if they had none.

    The base is one part of a pipeline, and its names may have a prefix that the adapter's lack.

    Args:
        source: The adapter.
        names: Of weights, such as ``lora_unet_mid_block_attentions_0_proj_in.weight``.
        stored: Names of the base's tensors.
        config: The base's.

    Returns:
        The base's name for each of ``names`` that is found, under the prefix by which most are. Of
        diffusers' U-Nets, the names of their makers mean the same layers.

    Raises:
        StarmergeError: A name means several tensors.
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
    # Of several that fit as many, none is the best.
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
    """Find the same weights under the names of other adapters, in any layout.

    Args:
        source: The adapter.
        names: Of its weights.
        known: Names of the weights of the others.

    Returns:
        The others' name for each of ``names``, or the name itself where they do not have it.

    Raises:
        UsageError: The others call the layers of the same model differently.
        StarmergeError: Two of ``names`` are one.
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
    """Refuse names of diffusers' model beside those of the model's maker, for the same layers."""
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
    """Return what the layers of a denoiser are called that a name is of, where it is known."""
    rest = _flat(part_of(name)[1])
    return next((kind for kind in _RIVALS if rest.startswith(f"{kind}_")), None)


def part_of(name: str) -> tuple[str, str]:
    """Return the part of a pipeline that a name begins with, and the rest of the name."""
    head, dot, rest = name.partition(".")
    if dot and head in _PARTS:
        return _PARTS[head], rest
    match = _PART.match(name)
    if match is None:
        return "", name
    return _PARTS.get(match["part"], match["part"]), name[match.end() :]


def flattened(names: Sequence[str]) -> list[str]:
    """Return the names of modules as kohya's scripts have them.

    Those of a pipeline's first text encoder begin with ``lora_te1`` where it has two, else with
    ``lora_te``. Names of no part are of the denoiser.

    Args:
        names: Of modules, with dots or as kohya has them.
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
    """Return a weight's name with underscores, but for the dot before its last part."""
    module, dot, parameter = name.rpartition(".")
    return f"{module.replace('.', '_')}{dot}{parameter}"


def _prefixes(flat: str) -> Iterable[str]:
    """Yield what a flat name may begin with that is no part of a module's own name."""
    yield ""
    for match in re.finditer("_", flat):
        yield flat[: match.end()]
