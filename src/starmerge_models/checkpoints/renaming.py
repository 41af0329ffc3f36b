"""Program that maps a checkpoint's tensors to those of transformers' model, called by names.py.

It calls transformers in a separate process; see :mod:`~starmerge_models.checkpoints.isolated`. For
a loaded model, :func:`naming_in` computes the mapping in the caller's process.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from starmerge_models.checkpoints.isolated import serve

_JOINS = {
    (("MergeModulelist", 0),),
    (("MergeModulelist", 0), ("Concatenate", 1)),
    (("Concatenate", 0),),
}
"""Operations of transformers' converters that concatenate stored tensors: those of one expert, and
those of several experts into a joined tensor."""


def naming(folder: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the sources of a model's tensors, and the tied and unused tensors.

    Args:
        folder: The model's folder, with its config.
        names: Names of the tensors in its files.

    Returns:
        ``sources``: for each tensor of the model, by name, the stored tensors whose concatenation
        along the first dimension it is; joined experts have one entry each, ``NAME[EXPERT]``.
        Tensors that are split or permuted are left out. ``ties``: for each tied tensor of the
        model, by name, the tensor to which it is tied. ``idle``: stored names of tensors that the
        model computes itself, or does not use.

    Raises:
        ImportError: transformers is not installed, or older than 5.
        LookupError: transformers does not know the model of the config.
        Exception: transformers may raise any error for a config.
    """
    import torch  # noqa: PLC0415  (slow to import, as all below)
    import transformers  # noqa: PLC0415

    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    kind = getattr(transformers, config.architectures[0])
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise LookupError(config.architectures[0])
    left = 4 * len(names) + 1000

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise LookupError("The model has many more tensors than its files.")

    counting = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            model = kind(config)
    finally:
        counting.remove()
    return naming_in(model, names)


def naming_in(model: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the sources of a loaded model's tensors, and the tied and unused tensors.

    Args:
        model: The model, a ``PreTrainedModel``.
        names: Names of tensors in its files.

    Returns:
        As :func:`naming`.

    Raises:
        ImportError: transformers is older than 5.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import (  # noqa: PLC0415
        WeightConverter,
        rename_source_key,
    )

    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if not isinstance(change, WeightConverter)]
    renamed = {name: rename_source_key(name, renamings, converters) for name in names}
    # The files of a bare model lack the prefix that it has in a model with a head.
    own, prefix = dict(model.named_parameters(remove_duplicate=False)), model.base_model_prefix
    for stored, (name, converter) in renamed.items():
        if name not in own and f"{prefix}.{name}" in own:
            renamed[stored] = f"{prefix}.{name}", converter
    idle = [stored for stored, (name, _) in renamed.items() if _is_idle(model, name)]
    taken = Counter(name for name, _ in renamed.values())
    sources = {
        name: [stored]
        for stored, (name, pattern) in renamed.items()
        if pattern is None and taken[name] == 1
    }
    pieces: dict[str, list[tuple[int, str]]] = {}
    for stored, (name, pattern) in renamed.items():
        converter = next((c for c in converters if pattern in c.source_patterns), None)
        if converter is None or _operations(converter) not in _JOINS:
            continue
        if _operations(converter)[0][0] == "MergeModulelist":
            numbers = [part for part in stored.split(".") if part.isdecimal()]
            joined = f"{name}[{numbers[-1]}]" if numbers else name
        else:
            joined = name
        pieces.setdefault(joined, []).append((converter.source_patterns.index(pattern), stored))
    sources |= {name: [stored for _, stored in sorted(own)] for name, own in pieces.items()}
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return {"sources": sources, "ties": ties, "idle": idle}


def _is_idle(model: Any, name: str) -> bool:
    """Return whether a model does not save a tensor, or drops it when it is loaded."""
    module, _, leaf = name.rpartition(".")
    try:
        own = model.get_submodule(module)
    except AttributeError:
        own = None
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    dropped = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return (
        leaf in getattr(own, "_non_persistent_buffers_set", ())
        or name in unsaved
        or any(re.search(pattern, name) for pattern in dropped)
    )


def _operations(converter: Any) -> tuple[tuple[str, object], ...]:
    return tuple((type(op).__name__, getattr(op, "dim", None)) for op in converter.operations)


if __name__ == "__main__":
    serve(naming)
