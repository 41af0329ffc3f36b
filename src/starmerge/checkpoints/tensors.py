"""A checkpoint's tensors: what is in the files, and reading one at a time.

The headers are read when a checkpoint is opened, the tensors when they are asked for. The format
of safetensors files is that of github.com/huggingface/safetensors: eight bytes with the length of a
JSON header, the header, the tensors one after the other.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate
from operator import mul
from typing import Any, Protocol

import torch
from torch import Tensor

from starmerge.checkpoints.experts import expert_name, is_stack, stack_of
from starmerge.checkpoints.pickled import PickledTensor, read_pickle
from starmerge.errors import StarmergeError
from starmerge.parsing import MOST_JSON_BYTES, parse_json
from starmerge.reading import read_json
from starmerge.storage import OutputFile, Place, ShortFileError, exists, storage_of

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

DIFFUSION_STEM = "diffusion_pytorch_model"
"""What diffusers' names of files with weights begin with."""

_MOST_TENSORS = 250_000
"""Most tensors in one file. A million take a process gigabytes of memory."""

_LONGEST_NAME = 1000
"""Bytes of a tensor's name."""

_LONGEST_LAYER = 18
"""Digits of a part of a name that is a number, so that it fits into 64 bits."""

_MAPPED = 2**16
"""Bytes; what is smaller is read sooner than it is mapped."""

_AHEAD = 2**20
"""Bytes; what is smaller is not worth a word to the system before it is read."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

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
        """Bytes of memory that reading it takes, where it is no window of a file."""
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
        """
        raise NotImplementedError

    def item(self, name: str, index: int) -> TensorInfo:
        """Return one entry of the first dimension, without that dimension."""
        return replace(self.rows(name, index, index + 1), shape=self.shape[1:])


@dataclass(frozen=True)
class _Stored(TensorInfo):
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

    def rows(self, name: str, start: int, stop: int) -> _Stored:
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
class _Unpacked(TensorInfo):
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


class Way(Protocol):
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
    way: Way
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


@dataclass(frozen=True)
class PickedRows:
    """Rows of several tables, in any order.

    Args:
        rows: For each row of the result the number of the table, and of the row in it.
    """

    rows: tuple[tuple[int, int], ...]

    def __call__(self, *parts: Tensor) -> Tensor:
        """Return the rows, in the dtype of the first table."""
        result = torch.empty(len(self.rows), *parts[0].shape[1:], dtype=parts[0].dtype)
        for number, table in enumerate(parts):
            targets = [i for i, (of, _) in enumerate(self.rows) if of == number]
            sources = [row for of, row in self.rows if of == number]
            result[targets] = table[sources].to(result.dtype)
        return result


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
        if not isinstance(info, _Stored) or info.stride is not None:
            target.write(raw_bytes(self.read(name).contiguous()), offset)
            return
        try:
            target.copy(info.file, info.offset, info.nbytes, offset)
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
    if isinstance(info, _Unpacked):
        return info.tensor
    if isinstance(info, Derived):
        return info.way(*(read_tensor(part, mapped=mapped) for part in info.parts))
    if not isinstance(info, _Stored):
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
    if isinstance(info, _Stored) and info.nbytes >= _AHEAD:
        storage_of(info.file).prefetch(info.file, info.offset, info.extent)


def _content(info: _Stored, *, mapped: bool) -> memoryview:
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


def open_checkpoint(folder: Place) -> Checkpoint:
    """Read the headers of a model's weights in a folder.

    Looked for, in this order: ``model.safetensors``, ``model.safetensors.index.json``, the same for
    ``diffusion_pytorch_model``, as diffusers calls them, ``pytorch_model.bin``,
    ``pytorch_model.bin.index.json``. No code from a ``.bin`` file is run.

    Raises:
        StarmergeError: There are no weights; a file is truncated, broken, missing, too large, or
            asks for code to be run; an index and its files disagree.
    """
    for stem, suffix, read in (
        ("model", "safetensors", _read_safetensors),
        (DIFFUSION_STEM, "safetensors", _read_safetensors),
        ("pytorch_model", "bin", _read_pickle),
    ):
        single = folder / f"{stem}.{suffix}"
        index = folder / f"{stem}.{suffix}.index.json"
        if exists(single):
            return Checkpoint(_by_expert(read(single)), mapped=True)
        if exists(index):
            return Checkpoint(_by_expert(_read_shards(index, read)), mapped=True)
    raise StarmergeError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index "
        "of shards."
    )


def open_safetensors(file: Place) -> Checkpoint:
    """Read the header of one safetensors file, such as that of an adapter.

    Raises:
        StarmergeError: The file is missing, truncated or broken.
    """
    metadata, tensors = _read_header(file)
    return Checkpoint(_by_expert(tensors), mapped=False, metadata=metadata)


def open_pickle(file: Place) -> Checkpoint:
    """Read the tensors' places of one ``.bin`` file; no code of it is run.

    Raises:
        StarmergeError: The file is missing, broken, or asks for code to be run.
    """
    return Checkpoint(_by_expert(_read_pickle(file)), mapped=False)


def open_weights(file: Place) -> Checkpoint:
    """Read the header of one file of weights: safetensors, or by any other ending a pickle.

    Raises:
        StarmergeError: The file is missing or broken, or asks for code to be run.
    """
    is_pickled = file.suffix.lower() != ".safetensors"
    return open_pickle(file) if is_pickled else open_safetensors(file)


def open_shards(file: Place) -> Checkpoint:
    """Read the headers of safetensors files that belong together, such as those of an adapter.

    Args:
        file: Their index, or any of them, ``NAME-00001-of-00003.safetensors``, where there is none.

    Raises:
        StarmergeError: A file is missing, truncated or broken; they and the index disagree.
    """
    if file.suffix == ".json":
        return Checkpoint(_by_expert(_read_shards(file, _read_safetensors)), mapped=False)
    stem, _, count = file.stem.rpartition("-of-")
    stem = stem.rpartition("-")[0]
    found: dict[str, TensorInfo] = {}
    for number in range(1, int(count) + 1):
        shard = file.parent / f"{stem}-{number:0{len(count)}d}-of-{count}.safetensors"
        for tensor in _read_safetensors(shard):
            if tensor.name in found:
                raise StarmergeError(
                    f"{shard} holds the tensor {tensor.name}, and so does "
                    f"{found[tensor.name].file}. Which of them counts cannot be told."
                )
            found[tensor.name] = tensor
    return Checkpoint(_by_expert(found.values()), mapped=False)


def _by_expert(tensors: Iterable[TensorInfo]) -> Iterator[TensorInfo]:
    """Yield tensors, those of joined experts one expert at a time."""
    for tensor in tensors:
        if not is_stack(tensor.name, tensor.shape):
            yield tensor
            continue
        for expert in range(tensor.shape[0]):
            yield replace(tensor.item(expert_name(tensor.name, expert), expert), origin=None)


def _read_shards(
    index: Place, read: Callable[[Place], Iterable[_Stored | _Unpacked]]
) -> Iterator[_Stored | _Unpacked]:
    """Yield the tensors of all shards of an index, and compare them with it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise StarmergeError(f"{index} has no 'weight_map'. Fetch it again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise StarmergeError(
                f"{index} puts tensor {name} into {shard!r}, which is no file. Fetch it again."
            )
        if shard in (".", "..") or not {"/", "\\", "\0"}.isdisjoint(shard):
            raise StarmergeError(f"{index} points out of its folder, to {shard!a}.")
    stored: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        for tensor in read(index.parent / shard):
            if tensor.name not in weight_map:
                raise StarmergeError(f"{index} lacks tensor {tensor.name}, which is in {shard}.")
            if tensor.name in stored:
                raise StarmergeError(
                    f"{index}: tensor {tensor.name} is in {stored[tensor.name]} and in {shard}. "
                    "Which of them counts cannot be told: fetch the shards again."
                )
            stored[tensor.name] = shard
            yield tensor
    for name, shard in weight_map.items():
        if stored.get(name) != shard:
            raise StarmergeError(f"{index} puts tensor {name} into {shard}, which lacks it.")


def _read_safetensors(file: Place) -> list[_Stored]:
    return _read_header(file)[1]


def _read_header(file: Place) -> tuple[dict[str, str], list[_Stored]]:
    """Return the metadata of a safetensors file, and its tensors in their order."""
    broken = f"{file} is not a complete safetensors file"
    try:
        with storage_of(file).stream(file) as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            (length,) = struct.unpack("<Q", stream.read(8) or b"")
            if 8 + length > size or length > MOST_JSON_BYTES:
                raise StarmergeError(f"{broken}: its header is cut off. Fetch it again.")
            content = stream.read(length) or b""
        header = parse_json(content)
        if not content.startswith(b"{"):
            raise ValueError("its header is no JSON object")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ is no object of texts")
        if len(header) > _MOST_TENSORS:
            raise ValueError(
                f"its header has {len(header):,} tensors, and {_MOST_TENSORS:,} are read at most. "
                "Save them in several files"
            )
        tensors = [
            _stored(name, entry, file, 8 + length, size, broken) for name, entry in header.items()
        ]
    except FileNotFoundError as error:
        raise StarmergeError(f"{file} is missing.") from error
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise StarmergeError(f"{broken}: {error}. Fetch it again.") from error
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
    for stored in tensors:
        if stored.offset != end:
            raise StarmergeError(
                f"{broken}: there is a hole or an overlap at tensor {stored.name}."
            )
        end += stored.nbytes
    if end != size:
        raise StarmergeError(f"{broken}: {size - end} bytes follow the last tensor.")
    return metadata, tensors


def _stored(
    name: str, entry: Mapping[str, Any], file: Place, begin: int, size: int, broken: str
) -> _Stored:
    """Check an entry of a header, of a file of some size whose tensors begin at some byte."""
    _check_name(file, name)
    (start, end), shape = entry["data_offsets"], entry["shape"]
    if not isinstance(shape, list) or not all(
        type(n) is int and 0 <= n < 2**63 for n in (start, end, *shape)
    ):
        raise StarmergeError(f"{broken}: tensor {name} has a strange shape or place.")
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise StarmergeError(
            f"{file}: tensor {name} has the dtype {entry['dtype']}, which cannot be merged "
            "or copied. Use an unquantised checkpoint."
        )
    stored = _Stored(name, dtype, tuple(shape), file, begin + start)
    # Along the dimensions, as safetensors multiplies them: a zero at the end does not help.
    if any(entries >= 2**63 for entries in accumulate(shape, mul)):
        raise StarmergeError(f"{broken}: tensor {name} has 2⁶³ entries or more.")
    if stored.nbytes != end - start:
        raise StarmergeError(f"{broken}: tensor {name} has the wrong size in the header.")
    if stored.offset + stored.nbytes > size:
        raise StarmergeError(
            f"{broken}: tensor {name} lies beyond the end of the file "
            f"({stored.offset + stored.nbytes} of {size} bytes). Fetch it again."
        )
    return stored


def _check_name(file: Place, name: str) -> None:
    """Refuse names whose handling would take for ever, or layers beyond what 64 bits count."""
    if len(name.encode()) > _LONGEST_NAME:
        raise StarmergeError(
            f"{file}: the name of tensor {name[:60]!a}… is longer than {_LONGEST_NAME} bytes. "
            "Rename it."
        )
    if stack_of(name):
        raise StarmergeError(
            f"{file}: the name of tensor {name} ends like that of one of several joined experts. "
            "Rename it."
        )
    for part in name.split("."):
        if len(part) > _LONGEST_LAYER and part.isdecimal():
            raise StarmergeError(
                f"{file}: tensor {name} has a layer's number of {len(part)} digits, and "
                f"{_LONGEST_LAYER} are read at most. Rename it."
            )


def _read_pickle(file: Place) -> list[_Stored | _Unpacked]:
    return [_unpickled(file, tensor) for tensor in read_pickle(file)]


def _unpickled(file: Place, found: PickledTensor) -> _Stored | _Unpacked:
    """Check a tensor of a ``.bin`` file."""
    name, dtype, shape = found.name, found.dtype, found.shape
    try:
        _check_name(file, name)
    except UnicodeEncodeError as error:
        raise StarmergeError(
            f"{file}: the tensor {name!a} has half a character in its name."
        ) from error
    if dtype not in DTYPE_CODES:
        raise StarmergeError(
            f"{file}: tensor {name} ({dtype}) cannot be stored in safetensors, nor merged."
        )
    if found.storage is not None:
        if not math.prod(shape):
            return _Unpacked(name, dtype, shape, file, torch.empty(shape, dtype=dtype))
        entries = torch.frombuffer(found.storage, dtype=torch.uint8)[found.offset :]
        entries = entries[: len(entries) // dtype.itemsize * dtype.itemsize].view(dtype)
        return _Unpacked(name, dtype, shape, file, entries.as_strided(shape, found.stride))
    rows = tuple(accumulate(shape[:0:-1], mul, initial=1))[::-1] if shape else ()
    is_plain = all(n == 1 or a == b for n, a, b in zip(shape, found.stride, rows, strict=True))
    stride = None if is_plain or not math.prod(shape) else found.stride
    return _Stored(name, dtype, shape, file, found.offset, stride)
