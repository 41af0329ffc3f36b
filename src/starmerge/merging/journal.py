"""What a merge has finished, so that the next run takes it up after this one was killed.

The journal, ``journal.jsonl``, lies in the hidden folder that the merge is made in, and is deleted
when the merge is complete. A line says of one tensor where it went, with the BLAKE3 of its bytes
there, and what the report says of it. A line is written after the tensor's bytes have reached the
disk, and counts only if the bytes that are found have that hash.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

from blake3 import blake3
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from starmerge.checkpoints.writer import ShardWriter
from starmerge.merging.layout import PlannedTensor
from starmerge.merging.outputs import Writing
from starmerge.merging.plan import Plan
from starmerge.merging.report import versions

JOURNAL = "journal.jsonl"

_SECONDS = 1.0
"""Between two times that what was written is flushed to the disk."""


def fingerprint(plan: Plan) -> str:
    """Return a hash of all that decides the bytes of a merge, 32 hexadecimal digits.

    The recipe, the versions of the packages that compute, and the input files, each by place, size,
    inode and the times of its last changes: the system stamps every change of a file's content, and
    nobody can set the time of that stamp back.
    """
    files = sorted((str(file.resolve()), *state) for file, state in plan.states.items())
    content = [plan.recipe.model_dump(), versions(plan.recipe), files]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return blake3(text.encode()).hexdigest(length=16)


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Entry:
    """What the journal says of one tensor."""

    digests: list[str]
    record: dict[str, Any] | None
    changing: list[int]
    """Numbers of the models of which some delta, up to here, is not zero."""


class Journal:
    """The journal of a merge; to be used as a context manager.

    Args:
        folder: Where the merge is made.
        writing: The output.
    """

    def __init__(self, folder: Path, writing: Writing) -> None:
        self._file, self._writing = folder / JOURNAL, writing
        self._entries = _read(self._file)
        self._fresh: list[str] = []
        self._touched: set[ShardWriter] = set()
        self._flushed = time.monotonic()
        self.taken_up = 0
        """Tensors that an earlier run had finished."""

    def __enter__(self) -> Journal:
        self._stream = os.open(self._file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
        if self._entries:  # the last line may have been cut off
            os.write(self._stream, b"\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._flush()
        finally:
            os.close(self._stream)

    def finished(self, tensor: PlannedTensor) -> Entry | None:
        """Return what an earlier run wrote of a tensor, if it lies on the disk as it was written.

        May be called by several threads, each for other tensors.
        """
        entry = self._entries.get(tensor.source.name)
        if entry is None:
            return None
        places = self._writing.places(tensor)
        if len(places) != len(entry.digests):
            return None
        known = list(zip(places, entry.digests, strict=True))
        if not all(writer.holds(name, digest) for (writer, name), digest in known):
            return None
        for writer, name in places:
            writer.take_up(name)
        return entry

    def add(
        self, tensor: PlannedTensor, record: dict[str, Any] | None, changing: Collection[int]
    ) -> None:
        """Note that a tensor was written.

        Args:
            tensor: The tensor.
            record: What the report says of it, if it was merged.
            changing: Numbers of the models of which some delta is not zero.
        """
        places = self._writing.places(tensor)
        line = {
            "tensor": tensor.source.name,
            "digests": [writer.digest(name) for writer, name in places],
            "record": record,
            "changing": sorted(changing),
        }
        self._fresh.append(json.dumps(line) + "\n")
        self._touched.update(writer for writer, _ in places)
        if time.monotonic() - self._flushed > _SECONDS:
            self._flush()

    def end(self) -> None:
        """Delete the journal: the output is complete."""
        self._fresh.clear()
        self._file.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._fresh:
            for writer in self._touched:
                writer.sync()
            os.write(self._stream, "".join(self._fresh).encode())
            os.fsync(self._stream)
            self._fresh.clear()
            self._touched.clear()
        self._flushed = time.monotonic()


def _read(file: Path) -> dict[str, Entry]:
    """Return the entries of a journal; lines that are damaged do not count."""
    entries = {}
    if file.is_file():
        for line in file.read_bytes().splitlines():
            try:
                content = json.loads(line)
                entry = Entry(content["digests"], content["record"], content["changing"])
                entries[content["tensor"]] = entry
            except (ValueError, LookupError, TypeError):
                continue
    return entries
