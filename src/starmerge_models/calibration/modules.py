"""The modules of a model that have moments, and the names of their matrices in the base's files."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.names import match_names
from starmerge_models.spectral.moment import Side


@dataclass(frozen=True)
class Linear:
    """A module that multiplies its input by a stored matrix."""

    module: nn.Module
    tensor: str
    """Name of the matrix in the base's files."""
    side: Side
    """The side of the matrix that multiplies the input."""
    size: int
    """n, the length of an input."""


def linears_of(model: Any, base: Base) -> tuple[list[Linear], list[str]]:
    """Find the linear modules of a model: ``nn.Linear``, and GPT-2's ``Conv1D``.

    Matrices that the model also uses elsewhere (a head tied to the embeddings), and matrices that
    have another name or shape in the base's files, are omitted.

    Args:
        model: The model, loaded by transformers.
        base: The base whose files it was loaded from.

    Returns:
        The modules in the model's order, and notes on omitted matrices.
    """
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415  (slow to import)

    sides: dict[type[nn.Module], Side] = {nn.Linear: "columns", Conv1D: "rows"}
    uses = Counter(
        id(weight) for module in model.modules() for weight in module.parameters(recurse=False)
    )
    modules: dict[str, tuple[nn.Module, Side]] = {}
    without: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        side = next((side for kind, side in sides.items() if isinstance(module, kind)), None)
        if isinstance(module, nn.modules.conv._ConvNd):
            without["convolutions, of which no moments are taken"].append(f"{name}.weight")
        elif side is not None and uses[id(weight)] > 1:
            without["tied to another module's"].append(f"{name}.weight")
        elif side is not None:
            modules[f"{name}.weight"] = module, side
    found = match_names(base.source, base, list(modules))
    linears = []
    for name, (module, side) in modules.items():
        tensor = found.get(name)
        shape: tuple[int, ...] = tuple(module.weight.shape)  # type: ignore[arg-type]
        if tensor is None or base.checkpoint[tensor].shape != shape:
            without["not in the base's files as the model has them"].append(name)
        else:
            linears.append(Linear(module, tensor, side, shape[side == "columns"]))
    # Such as the experts of a mixture, which multiply by slices of one tensor.
    fused = [
        name
        for name, weight in model.named_parameters()
        if weight.ndim == 3 and not any(name in names for names in without.values())
    ]
    if fused:
        without["of several matrices in one (experts), of which no moments are taken"] = fused
    notes = [f"{shorten(names)}: {reason}" for reason, names in without.items()]
    return linears, notes


def shorten(names: list[str]) -> str:
    """Return the first name and the number of the others, as text."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
