"""An unknown base: shapes and names that follow from the adapters, without weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from starmerge_models.checkpoints.base import Base, known_config
from starmerge_models.checkpoints.layers import family_of
from starmerge_models.checkpoints.lora.checks import fits_weight
from starmerge_models.checkpoints.lora.config import AdapterConfig
from starmerge_models.checkpoints.lora.formats import is_adapter, read_adapter
from starmerge_models.checkpoints.lora.opening import names_alone
from starmerge_models.checkpoints.source import Source
from starmerge_models.checkpoints.tensors import Checkpoint, TensorInfo
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.storage import Place

_MOST_ENTRIES = 2**34
"""Most entries of a dense update, because small factors of LoKr can describe a huge matrix."""


class _Shapes(Checkpoint):
    """A checkpoint of names and shapes without data."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        super().__init__([], mapped=False)
        self._tensors = tensors

    @property
    def files(self) -> list[Place]:
        """An empty list."""
        return []

    def read(self, name: str) -> Tensor:
        """Raise an error, because there are no weights.

        Raises:
            StarmergeError: Always.
        """
        raise StarmergeError(f"The base's weight {name} is needed, and no base was given.")


@dataclass(frozen=True)
class UnknownBase(Base):
    """A base of which only the shapes of the adapted weights are known.

    Linear weights are (out, in), as in PEFT, for any layout of the base's files.
    """

    has_weights: ClassVar[bool] = False


def unknown_base(sources: Sequence[Source], *, any_base: bool = False) -> Base:
    """Collect the name of the base and the shapes of its weights from adapters.

    The base's config is read if the adapters name an existing folder or a model in the Hub's cache;
    nothing is downloaded.

    Args:
        sources: The adapters.
        any_base: Accept adapters of different bases.

    Raises:
        UsageError: A model is not an adapter; the adapters name different bases, or use different
            names for the layers of one base.
        StarmergeError: A file is broken; two adapters disagree on the shape of a weight.
    """
    names: dict[str, AdapterConfig] = {}
    tensors: dict[str, TensorInfo] = {}
    origins: dict[str, Source] = {}
    has_parts: dict[bool, Source] = {}
    for source in sources:
        if not is_adapter(source):
            raise UsageError(
                f"{source} is no adapter (no adapter_config.json, and not the one file of an "
                "adapter), and without a base only adapters can be merged. Give the base before "
                "the models."
            )
        contents = read_adapter(source, {})
        if name := contents.config.base_name:
            names.setdefault(name, contents.config)
        has_parts.setdefault(contents.format.is_diffusion, source)
        if len(has_parts) > 1:
            raise UsageError(
                f"{has_parts[True]} is of a diffusion model, whose parts its names begin with, and "
                f"{has_parts[False]} is not. Give the base before the models."
            )
        found = names_alone(source, contents, tensors)
        if tensors.keys().isdisjoint(found.values()):
            _check_one_model(source, contents.names, origins)
        for update in contents.updates:
            shape = update.change.shape[::-1] if update.is_embedding else update.change.shape
            file = contents.config.file
            tensor = TensorInfo(found[update.weight], torch.float32, shape, file)
            if update.rank is None and tensor.size > _MOST_ENTRIES:
                raise StarmergeError(
                    f"{source}: the update of {tensor.name} is a matrix of the shape "
                    f"{list(shape)}, larger than any of a model. Is the file damaged?"
                )
            known = tensors.setdefault(tensor.name, tensor)
            origin = origins.setdefault(tensor.name, source)
            if len(known.shape) < len(shape) and fits_weight(known.shape, shape):
                tensors[tensor.name] = tensor  # a kernel, of which the other has the matrix
            elif not fits_weight(shape, known.shape):
                raise StarmergeError(
                    f"{source}: the update of {tensor.name} has the shape {list(shape)}, that of "
                    f"{origin} {list(known.shape)}. The adapters are of different bases."
                )
    if len({name.lower() for name in names}) > 1 and not any_base:
        first, second = list(names)[:2]
        raise UsageError(
            f"{names[first].file} names the base {first}, and {names[second].file} {second}. If "
            "both are the same weights, say so with --any-base."
        )
    name = next(iter(names), None)
    reference = Source(name or "a base that the adapters do not name", Path(), name, None)
    return UnknownBase(reference, _Shapes(tensors), known_config(name))


def _check_one_model(source: Source, names: Iterable[str], known: Mapping[str, Source]) -> None:
    """Refuse names that may or may not be known names without a prefix."""
    ours, theirs = ({family_of(name): name for name in each} for each in (names, known))
    for layers, name in ours.items():
        for others, other in theirs.items():
            shorter, longer = sorted((layers, others), key=len)
            if shorter and shorter != longer and longer.endswith(f".{shorter}"):
                raise UsageError(
                    f"{source} changes {name}, and {known[other]} {other}: whether "
                    "they mean layers of one model cannot be told, as no module is in both. Give "
                    "the base before the models."
                )
