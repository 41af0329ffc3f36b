"""A checkpoint's tensors: stored in its files or computed from stored ones, and read lazily.

The headers are read when a checkpoint is opened (:mod:`~starmerge_models.checkpoints.opening`), the
tensors on request.
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
"""Tensors of fewer bytes are read instead of mapped, which is faster."""

_AHEAD = 2**20
"""Tensors of fewer bytes are not prefetched."""


@dataclass(frozen=True)
class TensorInfo:
    """The name, dtype and shape of a tensor, known before its data is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Place
    origin: TensorInfo | None = field(default=None, kw_only=True, repr=False)
    """The stored tensor, if this is a renamed one or a part of it."""

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
        """The stored tensors from which it is read, under their names in the files."""
        return (self.origin or self,)

    @property
    def is_stored(self) -> bool:
        """Whether it is a whole stored tensor under its name in the file."""
        return self.origin is None

    @property
    def bytes_read(self) -> int:
        """Bytes that are read of files."""
        return self.nbytes

    @property
    def bytes_computed(self) -> int:
        """Bytes of memory that reading it allocates; 0 if the file is memory-mapped."""
        return 0

    def renamed(self, name: str) -> TensorInfo:
        """Return the same tensor under another name."""
        return replace(self, name=name, origin=self.origin or self)

    def rows(self, name: str, start: int, stop: int) -> TensorInfo:
        """Return a slice of rows, which are the entries of the first dimension, as a tensor.

        Args:
            name: Name of the new tensor.
            start: The first row.
            stop: The row after the last.

        Raises:
            NotImplementedError: The tensor is not stored; only its shape is known.
        """
        raise NotImplementedError(f"{self.name} lies in no file.")

    def item(self, name: str, index: int) -> TensorInfo:
        """Return one entry of the first dimension, without that dimension."""
        return replace(self.rows(name, index, index + 1), shape=self.shape[1:])


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor that is stored in a file without encoding."""

    offset: int
    """Position of its first byte in the file."""
    stride: tuple[int, ...] | None = None
    """Stride of each dimension in entries; None for a contiguous tensor in row-major order."""

    @property
    def extent(self) -> int:
        """Bytes of the file from the tensor's first to its last entry, including gaps."""
        if self.stride is None or not self.size:
            return self.nbytes
        steps = zip(self.shape, self.stride, strict=True)
        return (1 + sum((n - 1) * step for n, step in steps)) * self.dtype.itemsize

    @property
    def bytes_computed(self) -> int:
        """The tensor's bytes if the file is remote; 0 if it is memory-mapped."""
        return 0 if storage_of(self.file).is_mapped else self.extent

    def rows(self, name: str, start: int, stop: int) -> StoredTensor:
        """Return a slice of rows, which is a stored tensor too."""
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
    """A tensor of a compressed ``.bin`` file, which is held in memory."""

    tensor: Tensor

    def rows(self, name: str, start: int, stop: int) -> TensorInfo:
        """Return a slice of rows of the tensor in memory."""
        shape = (stop - start, *self.shape[1:])
        tensor = self.tensor[start:stop]
        return replace(self, name=name, shape=shape, tensor=tensor, origin=self.origin or self)

    def item(self, name: str, index: int) -> TensorInfo:
        """Return one entry of the first dimension, without that dimension."""
        tensor, origin = self.tensor[index], self.origin or self
        return replace(self, name=name, shape=self.shape[1:], tensor=tensor, origin=origin)


class Computation(Protocol):
    """The picklable function that computes a derived tensor."""

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return the tensor, in its declared dtype and shape.

        Args:
            parts: The tensors from which it is computed, read-only.
        """


@dataclass(frozen=True)
class Derived(TensorInfo):
    """A tensor that is not stored but computed lazily from other tensors."""

    parts: tuple[TensorInfo, ...]
    """The tensors from which it is computed; :attr:`file` is that of the first."""
    computation: Computation
    is_stored = False

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The stored tensors from which it is computed, without duplicates."""
        return stored_of(self.parts)

    @property
    def bytes_read(self) -> int:
        """Bytes that are read of files."""
        return sum(part.bytes_read for part in self.parts)

    @property
    def bytes_computed(self) -> int:
        """The tensor's bytes, and those of computed parts."""
        return self.nbytes + sum(part.bytes_computed for part in self.parts)

    def renamed(self, name: str) -> TensorInfo:
        """Return the same tensor under another name."""
        return replace(self, name=name)

    def rows(self, name: str, start: int, stop: int) -> TensorInfo:
        """Return a slice of rows; reading it computes the whole tensor."""
        shape = (stop - start, *self.shape[1:])
        return Derived(name, self.dtype, shape, self.file, (self,), RowsOf(start, stop))

    def item(self, name: str, index: int) -> TensorInfo:
        """Return one entry of the first dimension; reading it computes the whole tensor."""
        return Derived(name, self.dtype, self.shape[1:], self.file, (self,), RowsOf(index, None))


@dataclass(frozen=True)
class RowsOf:
    """A slice of the first dimension, or one entry without that dimension.

    Args:
        start: The first entry.
        stop: The entry after the last; None for the single entry ``start``.
    """

    start: int
    stop: int | None

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return the slice or entry of the single part."""
        (whole,) = parts
        return whole[self.start] if self.stop is None else whole[self.start : self.stop]


@dataclass(frozen=True)
class Joined:
    """The concatenation of tensors along the first dimension."""

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return the concatenated tensor."""
        return torch.cat(parts)


def stored_of(tensors: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Return the stored tensors from which tensors are read, in order, without duplicates."""
    found = {(own.file, own.name): own for tensor in tensors for own in tensor.stored}
    return tuple(found.values())


def joined(name: str, parts: Sequence[TensorInfo]) -> TensorInfo:
    """Return the lazy concatenation of tensors along the first dimension, in the widest dtype.

    Args:
        name: Name of the new tensor.
        parts: Tensors that differ in the first dimension at most; a single one is only renamed.
    """
    if len(parts) == 1:
        return parts[0].renamed(name)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    return Derived(name, dtype, shape, parts[0].file, tuple(parts), Joined())


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a folder, single-file or sharded, by name and in the order of the files.

    Args:
        tensors: The tensors, from the headers.
        mapped: Whether tensors are memory-mapped instead of read. Each mapped tensor in use takes a
            file descriptor, which is too many for hundreds of adapters.
        metadata: The metadata in the header of a single safetensors file.
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
        """The original checkpoint, with the stored tensors under their names in the files."""

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
        """The files of the tensors, or of those from which they are computed."""
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
        """Return one tensor in its stored dtype.

        A large tensor of a model is memory-mapped: only accessed pages are read, and the system can
        reclaim their memory. The caller must not write to it. If the file is truncated while it is
        accessed, the system kills the process.

        Raises:
            StarmergeError: The file has become shorter.
        """
        return read_tensor(self._tensors[name], mapped=self._mapped)

    def copy(self, name: str, target: OutputFile, offset: int) -> None:
        """Copy the bytes of one tensor into a file, without decoding them.

        Args:
            name: The tensor.
            target: The file.
            offset: Position of the first byte in the target.

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
        mapped: Whether a large tensor is memory-mapped instead of read.

    Raises:
        StarmergeError: The file has become shorter.
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
    """Let the storage prefetch a tensor that will be read soon."""
    if isinstance(info, Derived):
        for part in info.parts:
            prefetch(part)
    if isinstance(info, StoredTensor) and info.nbytes >= _AHEAD:
        storage_of(info.file).prefetch(info.file, info.offset, info.extent)


def _content(info: StoredTensor, *, mapped: bool) -> memoryview:
    """Return a tensor's bytes, memory-mapped or read."""
    storage = storage_of(info.file)
    fetch = storage.window if mapped else storage.read
    try:
        content = fetch(info.file, info.offset, info.extent)
    except ShortFileError as error:
        raise _ends_early(info) from error
    # A tensor may start at any byte of a file, but arithmetic requires aligned memory.
    is_aligned = not mapped or info.offset % info.dtype.itemsize == 0
    return content if is_aligned else memoryview(bytearray(content))


def _ends_early(info: TensorInfo) -> StarmergeError:
    return StarmergeError(f"{info.file} ends within tensor {info.name}. Fetch it again.")


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a view of the memory of a contiguous CPU tensor as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
