"""The seam between the engine and what it writes.

The engine asks an output for its places and its memory, hands it the merged tensors, and never asks
what kind it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from starmerge.merging.layout import Contents, Placing, PlannedTensor
from starmerge.methods.pipeline import Merged


@dataclass(frozen=True)
class Finished:
    """What an output says of itself once it is complete."""

    summary: str
    """What became of the update, in half a sentence."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the report holds of it, as plain data."""
    findings: Mapping[str, Any] = field(default_factory=dict)
    """What only the whole model told of a method, by the method's name."""


class Writing(Protocol):
    """An output that is being written. Threads put tensors into it, in any order."""

    def leave(self, tensor: PlannedTensor) -> None:
        """Write a tensor that no model changes."""

    def put(self, tensor: PlannedTensor, base: Tensor | None, merged: Merged) -> dict[str, Any]:
        """Write a merged tensor.

        Args:
            tensor: The tensor.
            base: The base's, as it was read; None where it is not.
            merged: What to add to the base.

        Returns:
            What the report says of it, as plain data.

        Raises:
            StarmergeError: It overflows the dtype of the output.
        """

    def finish(self, records: Sequence[Mapping[str, Any]]) -> Finished:
        """Write what belongs beside the tensors.

        Args:
            records: What :meth:`put` returned, in the order of the plan.
        """


class Output(Placing, Protocol):
    """What a merge is written as."""

    @property
    def kind(self) -> str:
        """Its name in recipes."""

    @property
    def library(self) -> str:
        """What loads it."""

    @property
    def reads_inputs(self) -> bool:
        """Whether it looks at the task vectors beside the merged update."""

    def check(self, contents: Contents) -> None:
        """Make sure, before anything is read, that what is merged can be written so.

        Raises:
            UsageError: It cannot.
        """

    def memory(self, tensor: PlannedTensor) -> int:
        """Estimate the bytes that writing a tensor takes, beside those of merging it."""

    def bytes_to_write(self, contents: Contents) -> int:
        """Return the bytes of the output, at most."""

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Return the bytes of what is written of a tensor, for a progress bar."""

    def open(self, contents: Contents, folder: Path) -> AbstractContextManager[Writing]:
        """Begin to write into a folder."""

    def usage(self, contents: Contents, folder: str) -> str:
        """Return how to use what was written, in a sentence or two for its card.

        Args:
            contents: What went into it.
            folder: The name of its folder.
        """
