"""What a merge has finished, so that the next run takes it up after this one was killed.

The journal, ``journal.jsonl``, lies in the hidden folder that the merge is made in, and is deleted
when the merge is complete. A line says of one tensor what the report will say of it, with the
BLAKE3 of its bytes in the output and of what it was made of. A line is written after the tensor's
bytes have reached the disk, and counts only if the bytes that are found have that hash, and if the
line has its own.
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
from starmerge_models.merging.work import Done
from starmerge_models.storage import OutputFolder, Place, is_file, real, storage_of

JOURNAL = "journal.jsonl"

_KEPT = ("record", "digests", "inputs", "changing")
"""Fields of what is said of a tensor."""

_CHECK = "blake3"
"""The key of a line's own hash."""

_SECONDS = 1.0
"""Between two times that what was written is flushed to the disk."""


def fingerprint(plan: Plan) -> str:
    """Return a hash of all that decides the bytes of a merge, 32 hexadecimal digits.

    The recipe, the versions of the packages that compute, whether there is a GPU to compute on, and
    the input files, each by its place and its identity, which changes with its content.
    """
    files = sorted((str(real(file)), *state.identity) for file, state in plan.states.items())
    content = [plan.recipe.model_dump(), versions(plan.recipe), ACCELERATOR.exists(), files]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return blake3(text.encode()).hexdigest(length=16)


class Journal:
    """The journal of a merge; to be used as a context manager.

    Args:
        folder: The output.
        writing: What is written into it.
    """

    def __init__(self, folder: OutputFolder, writing: Writing) -> None:
        self._folder, self._writing = folder, writing
        self.known = _read(folder.place(JOURNAL))
        """What an earlier run said of the tensors that it had written, by their names."""
        # The last line of an earlier run may have been cut off.
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
            # A disk that is full says so again, which must not hide why the merge ended.
            with suppress(*(() if kind is None else (OSError,))):
                self._flush()
        finally:
            self._writing.close(flush=kind is None)

    def add(self, tensor: PlannedTensor, done: Done) -> None:
        """Note that a tensor was written."""
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


def _read(file: Place) -> dict[str, Done]:
    """Return the entries of a journal; lines that are damaged do not count."""
    entries = {}
    if is_file(file):
        with storage_of(file).stream(file) as stream:
            lines = stream.readall().splitlines()
        for line in lines:
            try:
                content = json.loads(line)
                if content.pop(_CHECK) != _checksum(content):
                    continue
                entries[content.pop("tensor")] = Done(**content)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue
    return entries


def _checksum(line: dict[str, Any]) -> str:
    """Return the BLAKE3 of what a line says: a disk may have changed a letter of it."""
    return blake3(json.dumps(line).encode()).hexdigest()
