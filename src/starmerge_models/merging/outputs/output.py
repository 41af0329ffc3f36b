"""The seam between the engine and what it writes.

The engine asks an output for the dtype of each tensor in it and for its memory, hands it the merged
tensors, and never asks what kind it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from starmerge_models.checkpoints.writer import OutputTensor, ShardWriter
from starmerge_models.merging.layout import Contents, Placing, PlannedTensor
from starmerge_models.methods.pipeline import Merged
from starmerge_models.storage import OutputFolder


@dataclass(frozen=True)
class Finished:
    """What an output says of itself once it is complete."""

    summary: str
    """What became of the update, in half a sentence."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the report holds of it, as plain data."""
    findings: Mapping[str, Any] = field(default_factory=dict)
    """What only the whole model told of a method, by the method's name."""
    digests: Mapping[str, Sequence[tuple[OutputTensor, str]]] = field(default_factory=dict)
    """Every tensor with the BLAKE3 of its bytes, by its file, relative to the folder."""


Slot: TypeAlias = tuple[ShardWriter, str]
"""Where some of an output's bytes go: what writes them, and the name of the tensor there."""


class Writing(Protocol):
    """An output that is being written.

    Threads put tensors into it, in any order; so do other processes, to which it is pickled. What
    all of them have put is there when one of them finishes the output.
    """

    def slots(self, tensor: PlannedTensor) -> Sequence[Slot]:
        """Return where a tensor goes, always in the same order."""

    def leave(self, tensor: PlannedTensor) -> str:
        """Write a tensor that no model changes; return the BLAKE3 of the base's bytes."""

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

    def finish(
        self, records: Sequence[Mapping[str, Any]], digests: Mapping[str, Sequence[str]]
    ) -> Finished:
        """Write what belongs beside the tensors.

        Args:
            records: What :meth:`put` returned, in the order of the plan.
            digests: BLAKE3 of what lies in the slots of each tensor, by the tensor's name.
        """

    def close(self, *, flush: bool) -> None:
        """Let go of the files that this process has written to.

        Args:
            flush: Make what it has written survive a power cut.
        """


class Output(Placing, Protocol):
    """What a merge is written as."""

    @property
    def kind(self) -> str:
        """Its name in recipes."""

    @property
    def is_assembled(self) -> bool:
        """Whether its files are put together, when it is finished, of all tensors."""

    @property
    def reads_inputs(self) -> bool:
        """Whether it looks at the task vectors beside the merged update."""

    @property
    def member(self) -> str | None:
        """The file of the folder that alone is published, under the output's name; None: all."""

    def check(self, contents: Contents) -> None:
        """Make sure, before anything is read, that what is merged can be written so.

        Raises:
            UsageError: It cannot.
        """

    def memory(self, contents: Contents, tensor: PlannedTensor) -> int:
        """Estimate the bytes that writing a tensor takes, beside those of merging it."""

    def bytes_to_write(self, contents: Contents) -> int:
        """Return the bytes of the output, at most."""

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Return the bytes of what is written of a tensor, for a progress bar."""

    def lay_out(self, contents: Contents, folder: OutputFolder) -> Writing:
        """Make the files that the tensors go into, or take up those of an interrupted run."""

    def library(self, contents: Contents) -> str:
        """Return the library that loads it, as the Hub calls it."""

    def usage(self, contents: Contents, folder: str) -> str:
        """Return how to use what was written, in a sentence or two for its card.

        Args:
            contents: What went into it.
            folder: The name of its folder.
        """


def digests_by_file(
    writing: Writing, tensors: Iterable[PlannedTensor], digests: Mapping[str, Sequence[str]]
) -> dict[str, list[tuple[OutputTensor, str]]]:
    """Return all tensors of an output and their BLAKE3 by their files.

    Args:
        writing: The output.
        tensors: What it is made of.
        digests: As for :meth:`Writing.finish`.
    """
    known: dict[ShardWriter, dict[str, str]] = {}
    for tensor in tensors:
        slots = writing.slots(tensor)
        for (writer, name), digest in zip(slots, digests[tensor.source.name], strict=True):
            known.setdefault(writer, {})[name] = digest
    return {file: own for writer in known for file, own in writer.by_file(known[writer]).items()}
