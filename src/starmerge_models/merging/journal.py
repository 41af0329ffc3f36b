"""The journal of finished tensors, from which a later run resumes a killed merge.

The journal, ``journal.jsonl``, is in the hidden folder of the partial output, and is deleted when
the merge is complete. Each line holds the report's record of one tensor, with the BLAKE3 of its
bytes in the output and of its inputs. A line is written after the tensor's bytes have been synced
to the disk. A later run uses a line only if the bytes in the output have the hash, and if the
line's own checksum is right.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from blake3 import blake3

from starmerge_models.checkpoints.writer import ShardWriter
from starmerge_models.device import ACCELERATOR
from starmerge_models.merging.layout import PlannedTensor
from starmerge_models.merging.outputs import Writing
from starmerge_models.merging.plan import Plan
from starmerge_models.merging.report import versions
from starmerge_models.merging.work import TensorResult
from starmerge_models.storage import OutputFolder, Place, is_file, real, storage_of

JOURNAL = "journal.jsonl"

_KEPT = ("record", "digests", "inputs", "changing")
"""Fields of a :class:`TensorResult` that are stored."""

_CHECK = "blake3"
"""The key of a line's own checksum."""

_SECONDS = 1.0
"""Seconds between two syncs of written data to the disk."""


def fingerprint(plan: Plan) -> str:
    """Return a hash of everything that determines the bytes of a merge, 32 hexadecimal digits.

    It covers the recipe, the versions of the packages that compute, whether a GPU is used, and the
    input files, each by its place and its identity, which changes with its content.
    """
    files = sorted((str(real(file)), *state.identity) for file, state in plan.states.items())
    content = [plan.recipe.model_dump(), versions(plan.recipe), ACCELERATOR.exists(), files]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return blake3(text.encode()).hexdigest(length=16)


class Journal:
    """The journal of a merge, used as a context manager.

    Args:
        folder: The output.
        writing: The writer of the output.
    """

    def __init__(self, folder: OutputFolder, writing: Writing) -> None:
        self._folder, self._writing = folder, writing
        self.known = _read(folder.place(JOURNAL))
        """Results of the tensors that an earlier run has written, by name."""
        # Begin a new line, because the last line of an earlier run may be truncated.
        self._fresh = ["\n"]
        self._touched: dict[ShardWriter, set[str]] = {}
        self._flushed = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # A full disk raises the same error again, which must not hide the first one.
            with suppress(*(() if kind is None else (OSError,))):
                self._flush()
        finally:
            self._writing.close(flush=kind is None)

    def add(self, tensor: PlannedTensor, done: TensorResult) -> None:
        """Add the result of a written tensor."""
        said = {name: getattr(done, name) for name in _KEPT}
        line = {"tensor": tensor.source.name, **said}
        self._fresh.append(json.dumps({**line, _CHECK: _checksum(line)}) + "\n")
        for writer, name in self._writing.slots(tensor):
            self._touched.setdefault(writer, set()).add(name)
        if time.monotonic() - self._flushed > _SECONDS:
            self._flush()

    def end(self) -> None:
        """Delete the journal: the output is complete."""
        self._fresh.clear()
        self._folder.delete(JOURNAL)

    def _flush(self) -> None:
        if self._touched:
            for writer, names in self._touched.items():
                writer.sync(names)
            self._folder.append(JOURNAL, "".join(self._fresh).encode())
            self._fresh.clear()
            self._touched.clear()
        self._flushed = time.monotonic()


def _read(file: Place) -> dict[str, TensorResult]:
    """Return the entries of a journal; damaged lines are skipped."""
    entries = {}
    if is_file(file):
        with storage_of(file).stream(file) as stream:
            lines = stream.readall().splitlines()
        for line in lines:
            try:
                content = json.loads(line)
                if content.pop(_CHECK) != _checksum(content):
                    continue
                entries[content.pop("tensor")] = TensorResult(**content)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue
    return entries


def _checksum(line: dict[str, Any]) -> str:
    """Return the BLAKE3 of a line's content, which detects damage on the disk."""
    return blake3(json.dumps(line).encode()).hexdigest()
