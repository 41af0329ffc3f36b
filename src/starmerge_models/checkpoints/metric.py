"""Metric files: the second moments of the inputs of a base's linear modules, stored as roots.

A metric is one safetensors file. Its tensors "0", "1", … are roots R (k, n), float32, of second
moments Σ = RᵀR; a JSON text in its metadata assigns them to the base's tensors:

    {"version": 1,
     "base": {"name": "org/name", "blake3": {"model.safetensors": "…"}},
     "entries": [{"key": "0", "tensors": ["model.layers.0.self_attn.q_proj.weight", …],
                  "side": "columns", "task": null, "tokens": 10240}, …],
     "made_from": {…}}

``starmerge calibrate`` writes such files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from torch import Tensor

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.hashing import cached_blake3_of
from starmerge_models.checkpoints.opening import open_safetensors
from starmerge_models.checkpoints.tensors import DTYPE_CODES, Checkpoint, raw_bytes
from starmerge_models.errors import StarmergeError, UsageError, explain
from starmerge_models.parsing import parse_json
from starmerge_models.spectral.moment import Moment, Side
from starmerge_models.storage import Place, exists, place_of, storage_of
from starmerge_models.storage.local_folder import LocalFile

KEY = "starmerge_metric"
"""Key of the JSON text in the file's metadata."""

VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class _BaseModel(_Part):
    name: str
    blake3: dict[str, str]


class _Entry(_Part):
    key: str
    tensors: tuple[str, ...] = Field(min_length=1)
    side: Side
    task: str | None
    tokens: int = Field(ge=1)


class _Content(_Part):
    base: _BaseModel
    entries: tuple[_Entry, ...] = Field(min_length=1)
    made_from: dict[str, Any]

    @field_validator("made_from")
    @classmethod
    def _check_along(cls, made_from: dict[str, Any]) -> dict[str, Any]:
        TypeAdapter(dict[str, dict[str, str]] | None).validate_python(made_from.get("along"))
        return made_from


class Metric:
    """The second moments of a metric file; roots are read lazily.

    Its methods are thread-safe.

    Args:
        file: The file, for error messages.
        checkpoint: Its tensors.
        content: Its metadata.
    """

    def __init__(self, file: Place, checkpoint: Checkpoint, content: _Content) -> None:
        self.file = file
        self._checkpoint = checkpoint
        self._content = content
        self._entries = {
            (tensor, entry.task): entry for entry in content.entries for tensor in entry.tensors
        }

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks with separate moments, in the order of the file."""
        names = (entry.task for entry in self._content.entries)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    @property
    def along(self) -> Mapping[str, Mapping[str, str]] | None:
        """BLAKE3 of the models' files, by model and file, if inputs were computed along a merge.

        None if the inputs are those of the base.
        """
        return self._content.made_from.get("along")

    @property
    def made_from(self) -> Mapping[str, Any]:
        """Provenance of the moments: the text, the seed, the settings and the versions."""
        return self._content.made_from

    def has(self, tensor: str, task: str | None = None) -> bool:
        """Return whether there is a moment of the inputs of a tensor of the base.

        Args:
            tensor: Name of the tensor in the base's files.
            task: The task whose prompts are the inputs; None for the text that all tasks share.
        """
        return (tensor, task) in self._entries

    def moment(self, tensor: str, task: str | None = None) -> Moment:
        """Read the second moment of the inputs of a tensor of the base.

        The root's columns are always the entries of the input, for both sides of the tensor.

        Args:
            tensor: Name of the tensor in the base's files.
            task: The task whose prompts are the inputs; None for the text that all tasks share.

        Raises:
            UsageError: The file has no such moment.
            StarmergeError: The root has a NaN or an infinity, or the file has become shorter.
        """
        entry = self._entry(tensor, task)
        root = self._checkpoint.read(entry.key)
        if not torch.isfinite(root).all():
            raise StarmergeError(
                f"{self.file}: the moment of {tensor} (tensor {entry.key!r} of the file) has a NaN "
                "or an infinity. Make the file anew with `starmerge calibrate`."
            )
        return Moment(root, entry.tokens)

    def nbytes(self, tensor: str, task: str | None = None) -> int:
        """Return the bytes of a moment's root, 4 k n.

        Args:
            tensor: Name of the tensor in the base's files.
            task: The task whose prompts are the inputs; None for the text that all tasks share.

        Raises:
            UsageError: The file has no such moment.
        """
        return self._checkpoint[self._entry(tensor, task).key].nbytes

    def side(self, tensor: str) -> Side:
        """Return the side of the base's stored tensor on which the inputs are.

        Raises:
            UsageError: The file has no moment of it.
        """
        for task in (None, *self.tasks):
            if self.has(tensor, task):
                return self._entries[tensor, task].side
        return self._entry(tensor, None).side

    def check_base(self, base: Base) -> None:
        """Check that the moments are those of a base, by the recorded hashes of its files.

        Reads the base's weights, unless this process has hashed them before.

        Raises:
            UsageError: The base has other weights.
            StarmergeError: A moment does not fit the tensor to which it is assigned.
        """
        recorded = self._content.base
        files = {file.name: file for file in base.checkpoint.opened.files}
        if files.keys() != recorded.blake3.keys() or any(
            cached_blake3_of(file) != recorded.blake3[name] for name, file in files.items()
        ):
            raise UsageError(
                f"{self.file} was made from {recorded.name}, and the weights of {base.source} are "
                f"others. Make one for this base: starmerge calibrate {base.source} -o FILE."
            )
        for (tensor, _), entry in self._entries.items():
            shape = base.checkpoint[tensor].shape if tensor in base.checkpoint else ()
            size = self._checkpoint[entry.key].shape[1]
            if len(shape) != 2 or shape[entry.side == "columns"] != size:
                raise StarmergeError(
                    f"{self.file} is damaged: it has a moment of {size} inputs for {tensor}, which "
                    f"has the shape {list(shape)} in {base.source}, with the input along its "
                    f"{entry.side}. Make the file anew with `starmerge calibrate`."
                )

    def _entry(self, tensor: str, task: str | None) -> _Entry:
        try:
            return self._entries[tensor, task]
        except KeyError:
            of = "" if task is None else f" for the task {task!r}"
            known = ", ".join(self.tasks) or "none"
            raise UsageError(
                f"{self.file} has no moment of the inputs of {tensor}{of} (its tasks: {known})."
            ) from None


def open_metric(path: str | Place) -> Metric:
    """Open a metric file; reads only its header.

    Args:
        path: A file that ``starmerge calibrate`` wrote.

    Raises:
        UsageError: The file does not exist, is not a metric, or is of another version.
        StarmergeError: The file is broken.
    """
    file = place_of(path)
    if not exists(file) or storage_of(file).is_folder(file):
        raise UsageError(f"{file} is no file. A metric is what `starmerge calibrate` writes.")
    checkpoint = open_safetensors(file)
    text = checkpoint.metadata.get(KEY)
    if text is None:
        raise UsageError(
            f"{file} is no metric file: its metadata has no {KEY!r}. Make one with "
            "`starmerge calibrate`."
        )
    damaged = f"{file} is damaged"
    try:
        content = parse_json(text)
        version = content["version"]
    except (ValueError, LookupError, TypeError) as error:
        raise StarmergeError(f"{damaged}: the JSON of {KEY!r} cannot be read: {error}.") from error
    if version != VERSION:
        raise UsageError(
            f"{file} is a metric file of version {version}, and this release reads version "
            f"{VERSION}. Make it anew with `starmerge calibrate`."
        )
    try:
        parsed = _Content.model_validate(content)
    except ValidationError as error:
        raise StarmergeError(f"{damaged}: {explain(error)}.") from error
    _check_entries(damaged, checkpoint, parsed.entries)
    return Metric(file, checkpoint, parsed)


def is_metric(path: Place) -> bool:
    """Return whether a file is a metric, of any version, intact or damaged."""
    try:
        return KEY in open_safetensors(path).metadata
    except StarmergeError:
        return False


def _check_entries(damaged: str, checkpoint: Checkpoint, entries: Sequence[_Entry]) -> None:
    """Check that entries and tensors correspond one to one."""
    unused = dict.fromkeys(checkpoint)
    seen: dict[tuple[str, str | None], Side] = {}
    sides: dict[str, Side] = {}
    for entry in entries:
        if entry.key not in unused:
            fault = "which is not in the file" if entry.key not in checkpoint else "as another does"
            raise StarmergeError(
                f"{damaged}: the entry of {entry.tensors[0]} names the tensor {entry.key!r}, "
                f"{fault}."
            )
        del unused[entry.key]
        info = checkpoint[entry.key]
        k, n = info.shape if len(info.shape) == 2 else (1, 0)
        if info.dtype != torch.float32 or k > n:
            raise StarmergeError(
                f"{damaged}: the tensor {entry.key!r}, {info.dtype} {list(info.shape)}, is no "
                "float32 root (k, n) with k ≤ n."
            )
        for tensor in entry.tensors:
            if (tensor, entry.task) in seen:
                raise StarmergeError(f"{damaged}: two entries are of {tensor}.")
            seen[tensor, entry.task] = entry.side
            if sides.setdefault(tensor, entry.side) != entry.side:
                raise StarmergeError(f"{damaged}: two entries differ on the side of {tensor}.")
    if unused:
        raise StarmergeError(f"{damaged}: no entry is of its tensor {next(iter(unused))!r}.")


class MetricWriter:
    """Writes a metric file, root by root, and its header at the end.

    A safetensors file begins with its header, which contains the ranks, and these are only known
    after the last root. So space for the longest possible header is reserved, and the rest is
    filled with blanks, as the format allows.

    Args:
        file: The file to write; it is incomplete until the ``with`` block ends.
        base: The base's name, and the BLAKE3 of its weights' files by name.
        made_from: The text, the seed, the settings and the versions, as JSON values.
        tensors: All tensors of the base that may get a moment.
        tasks: The tasks that may get separate moments.
    """

    def __init__(
        self,
        file: Path,
        *,
        base: tuple[str, Mapping[str, str]],
        made_from: Mapping[str, Any],
        tensors: Sequence[str],
        tasks: Sequence[str] = (),
    ) -> None:
        self._base, self._made_from = base, made_from
        self._entries: list[dict[str, Any]] = []
        self._shapes: list[tuple[int, ...]] = []
        # The longest header has an entry for each tensor and task, and long numbers.
        long = 10**15
        entries = [
            _Entry(key=str(long), tensors=(name,), side="columns", task=task, tokens=long)
            for name in tensors
            for task in (None, *tasks)
        ]
        places = [(str(long), (long, long), (long, long))] * len(entries)
        text = self._header([entry.model_dump() for entry in entries], places)
        self._room = len(text) + -len(text) % 8
        self._end = 0
        self._file = LocalFile(file, 0)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def add(
        self, root: Tensor, tensors: Sequence[str], *, side: Side, task: str | None, tokens: int
    ) -> None:
        """Write the root of a moment.

        Args:
            root: R (k, n), float32, on the CPU.
            tensors: The base's tensors with these inputs.
            side: The side of the tensors on which the inputs are.
            task: The task whose prompts are the inputs; None for the shared text.
            tokens: Number of inputs in the mean.
        """
        key = str(len(self._entries))
        entry = _Entry(key=key, tensors=tuple(tensors), side=side, task=task, tokens=tokens)
        self._entries.append(entry.model_dump())
        self._shapes.append(tuple(root.shape))
        self._file.write(raw_bytes(root.contiguous()), 8 + self._room + self._end)
        self._end += root.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the file so far."""
        return 8 + self._room + self._end

    def _finish(self) -> None:
        places = []
        end = 0
        for number, shape in enumerate(self._shapes):
            start, end = end, end + 4 * shape[0] * shape[1]
            places.append((str(number), shape, (start, end)))
        text = self._header(self._entries, places)
        if len(text) > self._room:
            raise RuntimeError(f"A header of {len(text)} bytes has room for {self._room}.")
        content = struct.pack("<Q", self._room) + text.ljust(self._room)
        self._file.write(memoryview(content), 0)

    def _header(
        self,
        entries: Sequence[Mapping[str, Any]],
        places: Sequence[tuple[str, tuple[int, ...], tuple[int, int]]],
    ) -> bytes:
        name, hashes = self._base
        content = {
            "version": VERSION,
            "base": {"name": name, "blake3": dict(hashes)},
            "entries": list(entries),
            "made_from": dict(self._made_from),
        }
        tensors = [
            (key, {"dtype": DTYPE_CODES[torch.float32], "shape": shape, "data_offsets": offsets})
            for key, shape, offsets in places
        ]
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        parts = [("__metadata__", {"format": "pt", KEY: text}), *tensors]
        # Joined by hand instead of a dictionary, because the placeholder keys are not unique.
        joined = ",".join(
            f"{json.dumps(key)}:{json.dumps(part, separators=(',', ':'), ensure_ascii=False)}"
            for key, part in parts
        )
        return f"{{{joined}}}".encode()
