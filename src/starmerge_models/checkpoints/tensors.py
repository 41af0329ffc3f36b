"""A checkpoint's tensors: stored in its files or computed of such, read one at a time.

The headers are read when a checkpoint is opened (:mod:`~starmerge_models.checkpoints.opening`), the
tensors when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from starmerge_models.errors import StarmergeError
from starmerge_models.storage import OutputFile, Place, ShortFileError, storage_of

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors files."""

DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of tensors that a merge may change."""

_MAPPED = 2**16
"""Bytes; what is smaller is read sooner than it is mapped."""

_AHEAD = 2**20
"""Bytes; what is smaller is not worth a word to the system before it is read."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of one tensor before it is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Place
    origin: TensorInfo | None = field(default=None, kw_only=True, repr=False)
    """The tensor of the file, where this is the same under another name, or a part of it."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors of files that it is read from, under the names that they have there."""
        return (self.origin or self,)

    @property
    def is_stored(self) -> bool:
        """Whether a file holds all of it under its name."""
        return self.origin is None

    @property
    def bytes_read(self) -> int:
        """Bytes that are read of files."""
        return self.nbytes

    @property
    def bytes_computed(self) -> int:
        """Bytes of memory that reading it takes, where it is no window of a mapped file."""
        return 0

    def renamed(self, name: str) -> TensorInfo:
        """Return the same tensor under another name."""
        return replace(self, name=name, origin=self.origin or self)

    def rows(self, name: str, start: int, stop: int) -> TensorInfo:
        """Return some rows, entries of the first dimension, as a tensor of their own.

        Args:
            name: Its name.
            start: The first row.
            stop: The one after the last.

        Raises:
            NotImplementedError: The tensor lies in no file; only its shape is known.
        """
        raise NotImplementedError(f"{self.name} lies in no file.")

    def item(self, name: str, index: int) -> TensorInfo:
        """Return one entry of the first dimension, without that dimension."""
        return replace(self.rows(name, index, index + 1), shape=self.shape[1:])


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor whose entries lie in the file as they are."""

    offset: int
    """Position of its first byte in the file."""
    stride: tuple[int, ...] | None = None
    """Entries from one to the next, along each dimension; None: row after row, without gaps."""

    @property
    def extent(self) -> int:
        """Bytes of the file from its first to its last, with what lies between."""
        if self.stride is None or not self.size:
            return self.nbytes
        steps = zip(self.shape, self.stride, strict=True)
        return (1 + sum((n - 1) * step for n, step in steps)) * self.dtype.itemsize

    @property
    def bytes_computed(self) -> int:
        """Its bytes, where the file is not mapped into memory but fetched."""
        return 0 if storage_of(self.file).is_mapped else self.extent

    def rows(self, name: str, start: int, stop: int) -> StoredTensor:
        """Return some rows; their bytes lie in the file as they are."""
        step = self.stride[0] if self.stride else math.prod(self.shape[1:])
        return replace(
            self,
            name=name,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * step * self.dtype.itemsize,
            origin=self.origin or self,
        )

    def item(self, name: str, index: int) -> TensorInfo:
        """Return one entry of the first dimension, without that dimension."""
        row = self.rows(name, index, index + 1)
        return replace(row, shape=row.shape[1:], stride=self.stride and self.stride[1:])


@dataclass(frozen=True)
class UnpackedTensor(TensorInfo):
    """A tensor of a ``.bin`` file that was compressed, and is held in memory."""

    tensor: Tensor

    def rows(self, name: str, start: int, stop: int) -> TensorInfo:
        """Return some rows of the tensor in memory."""
        shape = (stop - start, *self.shape[1:])
        tensor = self.tensor[start:stop]
        return replace(self, name=name, shape=shape, tensor=tensor, origin=self.origin or self)

    def item(self, name: str, index: int) -> TensorInfo:
        """Return one entry of the first dimension, without that dimension."""
        tensor, origin = self.tensor[index], self.origin or self
        return replace(self, name=name, shape=self.shape[1:], tensor=tensor, origin=origin)


class Computation(Protocol):
    """How a derived tensor is computed; it can be pickled."""

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return the tensor, in the dtype and shape that were announced.

        Args:
            parts: What it is made of, as stored; not to be written to.
        """


@dataclass(frozen=True)
class Derived(TensorInfo):
    """A tensor that is computed of others when it is read, and lies in no file as it is."""

    parts: tuple[TensorInfo, ...]
    """What it is made of; :attr:`file` is that of the first."""
    computation: Computation
    is_stored = False

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors of files that it is read from, each once."""
        return stored_of(self.parts)

    @property
    def bytes_read(self) -> int:
        """Bytes that are read of files."""
        return sum(part.bytes_read for part in self.parts)

    @property
    def bytes_computed(self) -> int:
        """Its own bytes, and those of parts that are computed."""
        return self.nbytes + sum(part.bytes_computed for part in self.parts)

    def renamed(self, name: str) -> TensorInfo:
        """Return the same tensor under another name."""
        return replace(self, name=name)

    def rows(self, name: str, start: int, stop: int) -> TensorInfo:
        """Return some rows; all of the tensor is computed for them."""
        shape = (stop - start, *self.shape[1:])
        return Derived(name, self.dtype, shape, self.file, (self,), RowsOf(start, stop))

    def item(self, name: str, index: int) -> TensorInfo:
        """Return one entry of the first dimension; all of the tensor is computed for it."""
        return Derived(name, self.dtype, self.shape[1:], self.file, (self,), RowsOf(index, None))


@dataclass(frozen=True)
class RowsOf:
    """Some entries of the first dimension; or one, without that dimension.

    Args:
        start: The first.
        stop: The one after the last; None: only the first.
    """

    start: int
    stop: int | None

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return them, of the one part."""
        (whole,) = parts
        return whole[self.start] if self.stop is None else whole[self.start : self.stop]


@dataclass(frozen=True)
class Joined:
    """Tensors one below the other, joined along the first dimension."""

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return one tensor of all rows."""
        return torch.cat(parts)


def stored_of(tensors: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Return the tensors of files that some tensors are read from, each once, in their order."""
    found = {(own.file, own.name): own for tensor in tensors for own in tensor.stored}
    return tuple(found.values())


def joined(name: str, parts: Sequence[TensorInfo]) -> TensorInfo:
    """Return tensors one below the other as one, of the widest dtype among theirs.

    Args:
        name: Its name.
        parts: They differ in the first dimension at most; one alone is only renamed.
    """
    if len(parts) == 1:
        return parts[0].renamed(name)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    return Derived(name, dtype, shape, parts[0].file, tuple(parts), Joined())


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a folder, single-file or sharded, by name and in the order of the files.

    Args:
        tensors: What the headers say.
        mapped: Whether tensors are mapped into memory rather than read. Each that is in use then
            takes a file descriptor: not for hundreds of adapters.
        metadata: The texts that the header of a single safetensors file holds beside its tensors.
    """

    def __init__(
        self,
        tensors: Iterable[TensorInfo],
        *,
        mapped: bool,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._mapped = mapped
        self.metadata = dict(metadata or {})
        self.opened = self
        """The checkpoint with the tensors that its files have, under their names there."""

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def files(self) -> list[Place]:
        """The files that hold the tensors, or what they are computed of."""
        stored = (own for tensor in self._tensors.values() for own in tensor.stored)
        return list(dict.fromkeys(own.file for own in stored))

    def viewed(self, tensors: Iterable[TensorInfo]) -> Checkpoint:
        """Return a checkpoint of the same files with other entries: renamed, left out, derived.

        Args:
            tensors: The entries.
        """
        view = Checkpoint(tensors, mapped=self._mapped, metadata=self.metadata)
        view.opened = self.opened
        return view

    def read(self, name: str) -> Tensor:
        """Return one tensor, in the dtype it is stored in.

        A large tensor of a model is a window of its file, mapped into memory: what is not looked
        at is not read, and what was read takes no memory that the system could not have back. It is
        not to be written to. If the file is cut off while it is looked at, the system ends the
        process.

        Raises:
            StarmergeError: The file is shorter than it was.
        """
        return read_tensor(self._tensors[name], mapped=self._mapped)

    def copy(self, name: str, target: OutputFile, offset: int) -> None:
        """Copy the bytes of one tensor into a file, without decoding them.

        Args:
            name: The tensor.
            target: The file.
            offset: Where the first byte goes.

        Raises:
            StarmergeError: The file ends early.
        """
        info = self._tensors[name]
        if not isinstance(info, StoredTensor) or info.stride is not None:
            target.write(raw_bytes(self.read(name).contiguous()), offset)
            return
        try:
            storage_of(info.file).copy(info.file, info.offset, info.nbytes, target, offset)
        except ShortFileError as error:
            raise _ends_early(info) from error


def read_tensor(info: TensorInfo, *, mapped: bool = True) -> Tensor:
    """Return a tensor of some checkpoint; see :meth:`Checkpoint.read`.

    Args:
        info: The tensor.
        mapped: Whether it is mapped into memory rather than read, if it is large.

    Raises:
        StarmergeError: The file is shorter than it was.
    """
    if isinstance(info, UnpackedTensor):
        return info.tensor
    if isinstance(info, Derived):
        return info.computation(*(read_tensor(part, mapped=mapped) for part in info.parts))
    if not isinstance(info, StoredTensor):
        raise TypeError(f"{info.name} lies in no file.")
    if not info.size:
        return torch.empty(info.shape, dtype=info.dtype)
    content = _content(info, mapped=mapped and info.nbytes >= _MAPPED)
    entries = torch.frombuffer(content, dtype=torch.uint8).view(info.dtype)
    if info.stride is not None:
        return entries.as_strided(info.shape, info.stride)
    return entries.view(info.shape)


def prefetch(info: TensorInfo) -> None:
    """Tell the storage that a tensor will soon be read."""
    if isinstance(info, Derived):
        for part in info.parts:
            prefetch(part)
    if isinstance(info, StoredTensor) and info.nbytes >= _AHEAD:
        storage_of(info.file).prefetch(info.file, info.offset, info.extent)


def _content(info: StoredTensor, *, mapped: bool) -> memoryview:
    """Return a tensor's bytes: mapped into memory, or read."""
    storage = storage_of(info.file)
    fetch = storage.window if mapped else storage.read
    try:
        content = fetch(info.file, info.offset, info.extent)
    except ShortFileError as error:
        raise _ends_early(info) from error
    # Files of others may begin a tensor at any byte; arithmetic wants numbers where they belong.
    is_aligned = not mapped or info.offset % info.dtype.itemsize == 0
    return content if is_aligned else memoryview(bytearray(content))


def _ends_early(info: TensorInfo) -> StarmergeError:
    return StarmergeError(f"{info.file} ends within tensor {info.name}. Fetch it again.")


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes, sharing it."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
