"""What a format gets to see of an adapter, and what it returns."""

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
    """An adapter's weights and its config, before it is known whose they are."""

    source: Source
    """For messages."""
    weights: Place
    """The file."""
    checkpoint: Checkpoint
    config: Place | None
    """``adapter_config.json`` beside it, if there is one."""
    settings: Mapping[str, Any]
    """What it says; nothing where there is none."""

    def number(self, key: str) -> float:
        """Return the one number that a tensor holds, such as an alpha.

        Raises:
            StarmergeError: It has several entries, or none, or is not finite.
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
    """A and B of some parameter of a module; which one, their shapes tell."""

    module: str
    """The module's name as PEFT knows it."""
    a: str
    b: str
    parameters: tuple[str, ...]
    """Names of the module's parameters that may be meant."""


@dataclass(frozen=True)
class AdapterContents:
    """An adapter's file, read: the updates, and what is known of the adapter beside them."""

    format: Format
    checkpoint: Checkpoint
    updates: list[Update]
    config: AdapterConfig
    """What its config says of base, task and layers, in PEFT's terms."""
    saved: dict[str, str] = field(default_factory=dict)
    """Tensors of modules that were trained whole: the key by the name of the tensor."""
    parameters: tuple[Factors, ...] = ()
    """Factors of parameters that are no weights of a module's own, such as joined experts."""
    copies: dict[str, str] = field(default_factory=dict)
    """Copies of the base's weights: the key by the name of the weight."""
    undeclared: frozenset[str] = frozenset()
    """Names of those that only their equality with the base tells to be copies."""
    beside: tuple[Place, ...] = ()
    """The files that the updates depend on beside the weights."""

    @property
    def names(self) -> list[str]:
        """The names of all weights that are updated or replaced, as the file has them."""
        return [*(update.weight for update in self.updates), *self.saved]


class Format(Protocol):
    """A layout that some tool writes adapters in."""

    @property
    def title(self) -> str:
        """Whose it is, for people."""

    @property
    def is_diffusion(self) -> bool:
        """Whether modules are named within a pipeline's parts, such as unet and text_encoder."""

    @property
    def has_flat_names(self) -> bool:
        """Whether the paths of modules have underscores in place of dots."""

    def recognises(self, file: AdapterFile) -> bool:
        """Tell, by keys and config, whether a file has this layout."""

    def read(self, file: AdapterFile, model: Mapping[str, Any]) -> AdapterContents:
        """Tell what each tensor of a file is.

        Args:
            file: The adapter.
            model: The base's ``config.json``; empty where it is not known.

        Raises:
            UsageError: The adapter is of a kind that is not merged.
            StarmergeError: A tensor is missing, unknown or of the wrong shape.
        """
