"""The interface between the engine and the kinds of output.

The engine asks an output for the dtype of each tensor and for its memory, and passes it the merged
tensors. The engine has no code for particular kinds of output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from starmerge_models.checkpoints.writer import OutputTensor, ShardWriter
from starmerge_models.merging.layout import Contents, Placement, PlannedTensor
from starmerge_models.methods.pipeline import Merged
from starmerge_models.storage import OutputFolder


@dataclass(frozen=True)
class Finished:
    """The result of a finished output."""

    summary: str
    """A phrase about the precision of the written update."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Entries for the report, as plain data."""
    findings: Mapping[str, Any] = field(default_factory=dict)
    """Statistics of methods that need the whole output, by the method's name."""
    digests: Mapping[str, Sequence[tuple[OutputTensor, str]]] = field(default_factory=dict)
    """Every tensor with the BLAKE3 of its bytes, by its file, relative to the folder."""


Slot: TypeAlias = tuple[ShardWriter, str]
"""A place for bytes of an output: the writer of the shards, and the name of the tensor in them."""


class Writing(Protocol):
    """The writer of an output.

    Threads write tensors to it in any order, and so do other processes, to which it is pickled. The
    output is finished by one process, after all tensors have been written.
    """

    def slots(self, tensor: PlannedTensor) -> Sequence[Slot]:
        """Return the slots of a tensor, always in the same order."""

    def leave(self, tensor: PlannedTensor) -> str:
        """Write a tensor that no model changes; return the BLAKE3 of the base's bytes."""

    def put(self, tensor: PlannedTensor, base: Tensor | None, merged: Merged) -> dict[str, Any]:
        """Write a merged tensor.

        Args:
            tensor: The tensor.
            base: The values of the base's tensor; None if it is not read.
            merged: The update to add to the base.

        Returns:
            The tensor's entries for the report, as plain data.

        Raises:
            StarmergeError: The result overflows the dtype of the output.
        """

    def finish(
        self, records: Sequence[Mapping[str, Any]], digests: Mapping[str, Sequence[str]]
    ) -> Finished:
        """Write all files other than the tensors.

        Args:
            records: The results of :meth:`put`, in the order of the plan.
            digests: BLAKE3 of the content of each tensor's slots, by the tensor's name.
        """

    def close(self, *, flush: bool) -> None:
        """Close the files that this process has written.

        Args:
            flush: Sync the written data to the disk first.
        """


class Output(Placement, Protocol):
    """A kind of output with its options."""

    @property
    def kind(self) -> str:
        """Name of the kind in recipes."""

    @property
    def is_assembled(self) -> bool:
        """Whether the final files are assembled from all tensors at the end."""

    @property
    def reads_inputs(self) -> bool:
        """Whether the output reads the task vectors in addition to the merged update."""

    @property
    def member(self) -> str | None:
        """The only file that is published, under the output's name; None for the whole folder."""

    def check(self, contents: Contents) -> None:
        """Check, before any tensor is read, that the merge can be written as this kind of output.

        Raises:
            UsageError: It cannot.
        """

    def memory(self, contents: Contents, tensor: PlannedTensor) -> int:
        """Estimate the memory for writing a tensor, without that for merging it, in bytes."""

    def bytes_to_write(self, contents: Contents) -> int:
        """Return an upper bound of the output's bytes."""

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Return the bytes that count for a tensor in the progress bar."""

    def lay_out(self, contents: Contents, folder: OutputFolder) -> Writing:
        """Create the files for the tensors, or open those of an interrupted run."""

    def library(self, contents: Contents) -> str:
        """Return the Hub's name of the library that loads the output."""

    def usage(self, contents: Contents, folder: str) -> str:
        """Return instructions for the model card, one or two sentences.

        Args:
            contents: The content of the output.
            folder: The name of the output's folder.
        """


def digests_by_file(
    writing: Writing, tensors: Iterable[PlannedTensor], digests: Mapping[str, Sequence[str]]
) -> dict[str, list[tuple[OutputTensor, str]]]:
    """Return all tensors of an output with their BLAKE3, by file.

    Args:
        writing: The writer of the output.
        tensors: The tensors of the plan.
        digests: As for :meth:`Writing.finish`.
    """
    known: dict[ShardWriter, dict[str, str]] = {}
    for tensor in tensors:
        slots = writing.slots(tensor)
        for (writer, name), digest in zip(slots, digests[tensor.source.name], strict=True):
            known.setdefault(writer, {})[name] = digest
    return {file: own for writer in known for file, own in writer.by_file(known[writer]).items()}
