"""The interface of adapter formats: their input, their result, and the protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from starmerge_models.checkpoints.lora.config import AdapterConfig
from starmerge_models.checkpoints.lora.update import Update
from starmerge_models.checkpoints.source import Source
from starmerge_models.checkpoints.tensors import Checkpoint
from starmerge_models.errors import StarmergeError
from starmerge_models.storage import Place


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's weights and config, before its format is known."""

    source: Source
    """Source of the adapter, for error messages."""
    weights: Place
    """The file of the weights."""
    checkpoint: Checkpoint
    config: Place | None
    """``adapter_config.json`` in the same folder, if it exists."""
    settings: Mapping[str, Any]
    """Content of the config; empty without one."""

    def number(self, key: str) -> float:
        """Return the number in a tensor of one entry, such as an alpha.

        Raises:
            StarmergeError: The tensor does not have exactly one entry, or it is not finite.
        """
        info = self.checkpoint[key]
        if info.size != 1:
            raise StarmergeError(
                f"{self.source}: {key} has the shape {list(info.shape)}, and is to be one number. "
                "Is the file damaged?"
            )
        value = float(self.checkpoint.read(key))
        if not math.isfinite(value):
            raise StarmergeError(f"{self.source}: {key} is {value}, which scales nothing.")
        return value


@dataclass(frozen=True)
class Factors:
    """A and B of a parameter of a module, which is identified by their shapes."""

    module: str
    """The module's name in PEFT."""
    a: str
    b: str
    parameters: tuple[str, ...]
    """Names of the module's parameters to which they may belong."""


@dataclass(frozen=True)
class AdapterContents:
    """The interpreted content of an adapter's file."""

    format: Format
    checkpoint: Checkpoint
    updates: list[Update]
    config: AdapterConfig
    """Base, task and layers from its config, in PEFT's terms."""
    saved: dict[str, str] = field(default_factory=dict)
    """Keys of tensors of modules that were trained whole, by name of the tensor."""
    parameters: tuple[Factors, ...] = ()
    """Factors of parameters other than a module's weight, such as joined experts."""
    copies: dict[str, str] = field(default_factory=dict)
    """Keys of copies of the base's weights, by name of the weight."""
    undeclared: frozenset[str] = frozenset()
    """Names of possible copies, which are copies only if they equal the base's weights."""
    other_files: tuple[Place, ...] = ()
    """Other files on which the updates depend."""

    @property
    def names(self) -> list[str]:
        """The file's names of all weights that are updated or replaced."""
        return [*(update.weight for update in self.updates), *self.saved]


class Format(Protocol):
    """The format of adapters of a tool."""

    @property
    def title(self) -> str:
        """Name of the format for the user."""

    @property
    def is_diffusion(self) -> bool:
        """Whether names of modules begin with a part of a pipeline, such as unet."""

    @property
    def has_flat_names(self) -> bool:
        """Whether names of modules have underscores instead of dots."""

    def recognises(self, file: AdapterFile) -> bool:
        """Return whether a file has this format, by keys and config."""

    def read(self, file: AdapterFile, model: Mapping[str, Any]) -> AdapterContents:
        """Interpret the tensors of a file.

        Args:
            file: The adapter.
            model: The base's ``config.json``; empty if unknown.

        Raises:
            UsageError: The adapter is of an unsupported kind.
            StarmergeError: A tensor is missing, unknown or of the wrong shape.
        """
