"""A checkpoint's tensors: what is in the files, and reading one at a time.

The headers are read when a checkpoint is opened, the tensors when they are asked for. The format
of safetensors files is that of github.com/huggingface/safetensors: eight bytes with the length of a
JSON header, the header, the tensors one after the other.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starmerge.checkpoints.source import read_json
from starmerge.errors import StarmergeError

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

_LONGEST_HEADER = 100 * 10**6
"""Bytes; the limit of safetensors itself."""

_CHUNK = 64 * 2**20
"""Bytes copied between files at once."""

_PIECE = 2**20
"""Bytes copied at once where they pass through this process."""

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
    file: Path

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class _Stored(TensorInfo):
    """A tensor of a safetensors file."""

    offset: int
    """Position of its first byte in the file."""


@dataclass(frozen=True)
class _Unpickled(TensorInfo):
    """A tensor of a ``.bin`` file, which torch has memory-mapped."""

    tensor: Tensor


class Checkpoint:
    """The tensors of a folder, single-file or sharded, by name and in the order of the files.

    Args:
        tensors: What the headers say.
        mapped: Whether tensors are mapped into memory rather than read. Each that is in use then
            takes a file descriptor: not for hundreds of adapters.
        metadata: The texts that the header of a single safetensors file holds beside its tensors.
    """

    def __init__(
        self,
        tensors: Iterable[_Stored | _Unpickled],
        *,
        mapped: bool,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._mapped = mapped
        self.metadata = dict(metadata or {})

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(dict.fromkeys(tensor.file for tensor in self._tensors.values()))

    def read(self, name: str) -> Tensor:
        """Return one tensor, in the dtype it is stored in.

        A large tensor of a model is a window of its file, mapped into memory: what is not looked
        at is not read, and what was read takes no memory that the system could not have back. It is
        not to be written to. If the file is cut off while it is looked at, the system ends the
        process.

        Raises:
            StarmergeError: The file is shorter than it was.
        """
        info = self._tensors[name]
        if isinstance(info, _Unpickled):
            return info.tensor
        if not info.size:
            return torch.empty(info.shape, dtype=info.dtype)
        mapped = self._mapped and info.nbytes >= _MAPPED
        window = _window(info) if mapped else _content(info)
        return torch.frombuffer(window, dtype=torch.uint8).view(info.dtype).view(info.shape)

    def copy(self, name: str, target: int, offset: int) -> None:
        """Copy the bytes of one tensor into a file, without decoding them.

        Args:
            name: The tensor.
            target: Descriptor of the file.
            offset: Where the first byte goes.

        Raises:
            StarmergeError: The file ends early.
        """
        info = self._tensors[name]
        if isinstance(info, _Unpickled):
            write_at(target, raw_bytes(info.tensor.contiguous()), offset)
            return
        with info.file.open("rb", buffering=0) as source:
            done = 0
            while done < info.nbytes:
                count = min(info.nbytes - done, _CHUNK)
                copied = _copy(source.fileno(), target, count, info.offset + done, offset + done)
                if not copied:
                    raise _ends_early(info)
                done += copied


def prefetch(info: TensorInfo) -> None:
    """Tell the system, where it can be told, that a tensor will soon be read."""
    if isinstance(info, _Stored) and info.nbytes >= _AHEAD and hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), info.file.open("rb", buffering=0) as file:
            place = info.offset, info.nbytes
            os.posix_fadvise(file.fileno(), *place, os.POSIX_FADV_WILLNEED)


def write_at(target: int, content: memoryview, offset: int) -> None:
    """Write bytes to a place of an open file."""
    while content:
        count = os.pwrite(target, content, offset)
        content, offset = content[count:], offset + count


def _window(info: _Stored) -> memoryview:
    """Map a tensor's bytes into memory, privately."""
    start = info.offset - info.offset % mmap.ALLOCATIONGRANULARITY
    length = info.offset + info.nbytes - start
    with info.file.open("rb", buffering=0) as file:
        try:
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        except ValueError as error:  # the file has become shorter
            raise _ends_early(info) from error
    view = memoryview(mapped)[info.offset - start :]
    # Files of others may begin a tensor at any byte; arithmetic wants numbers where they belong.
    return view if info.offset % info.dtype.itemsize == 0 else memoryview(bytearray(view))


def _content(info: _Stored) -> memoryview:
    """Read a tensor's bytes."""
    content = memoryview(bytearray(info.nbytes))
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.offset)
        left = content
        while left:
            count = file.readinto(left)
            if not count:
                raise _ends_early(info)
            left = left[count:]
    return content


def _copy(source: int, target: int, count: int, start: int, offset: int) -> int:
    """Copy bytes between files, within the system if it can; return how many were copied."""
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):  # file systems that cannot, or not to each other
            copied = os.copy_file_range(source, target, count, start, offset)
            if copied:
                return copied
    content = os.pread(source, min(count, _PIECE), start)
    write_at(target, memoryview(content), offset)
    return len(content)


def _ends_early(info: TensorInfo) -> StarmergeError:
    return StarmergeError(f"{info.file} ends within tensor {info.name}. Fetch it again.")


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes, sharing it."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a model's weights in a folder.

    Looked for, in this order: ``model.safetensors``, ``model.safetensors.index.json``,
    ``pytorch_model.bin``, ``pytorch_model.bin.index.json``. A ``.bin`` file is read by
    ``torch.load(weights_only=True)``, which runs no code from it.

    Raises:
        StarmergeError: There are no weights; a file is truncated, broken, missing, or asks for code
            to be run; an index and its files disagree.
    """
    for stem, suffix, read in (
        ("model", "safetensors", _read_safetensors),
        ("pytorch_model", "bin", _read_pickle),
    ):
        single = folder / f"{stem}.{suffix}"
        index = folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return Checkpoint(read(single), mapped=True)
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise StarmergeError(f"{index} has no 'weight_map'. Fetch it again.")
            shards = sorted(set(map(str, weight_map.values())))
            for shard in shards:
                if Path(shard).name != shard:
                    raise StarmergeError(f"{index} points out of its folder, to {shard}.")
            tensors = [tensor for shard in shards for tensor in read(folder / shard)]
            stored = {tensor.name: tensor.file.name for tensor in tensors}
            for name, shard in weight_map.items():
                if stored.get(name) != shard:
                    raise StarmergeError(
                        f"{index} puts tensor {name} into {shard}, which lacks it."
                    )
            for name, shard in stored.items():
                if name not in weight_map:
                    raise StarmergeError(f"{index} lacks tensor {name}, which is in {shard}.")
            return Checkpoint(tensors, mapped=True)
    raise StarmergeError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index "
        "of shards."
    )


def open_safetensors(file: Path) -> Checkpoint:
    """Read the header of one safetensors file, such as that of an adapter.

    Raises:
        StarmergeError: The file is missing, truncated or broken.
    """
    metadata, tensors = _read_header(file)
    return Checkpoint(tensors, mapped=False, metadata=metadata)


def open_pickle(file: Path) -> Checkpoint:
    """Read the tensors' places of one ``.bin`` file, by ``torch.load(weights_only=True)``.

    Raises:
        StarmergeError: The file is missing, broken, or asks for code to be run.
    """
    return Checkpoint(_read_pickle(file), mapped=False)


def _read_safetensors(file: Path) -> list[_Stored]:
    return _read_header(file)[1]


def _read_header(file: Path) -> tuple[dict[str, str], list[_Stored]]:
    """Return the metadata of a safetensors file, and its tensors in their order."""
    broken = f"{file} is not a complete safetensors file"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if 8 + length > size or length > _LONGEST_HEADER:
                raise StarmergeError(f"{broken}: its header is cut off. Fetch it again.")
            header = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
        metadata = dict(header.pop("__metadata__", None) or {})
        tensors = []
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (start, end, *entry["shape"])):
                raise StarmergeError(f"{broken}: tensor {name} has a strange shape or place.")
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise StarmergeError(
                    f"{file}: tensor {name} has the dtype {entry['dtype']}, which cannot be merged "
                    "or copied. Use an unquantised checkpoint."
                )
            stored = _Stored(name, dtype, tuple(entry["shape"]), file, 8 + length + start)
            if stored.nbytes != end - start:
                raise StarmergeError(f"{broken}: tensor {name} has the wrong size in the header.")
            if stored.offset + stored.nbytes > size:
                raise StarmergeError(
                    f"{broken}: tensor {name} lies beyond the end of the file "
                    f"({stored.offset + stored.nbytes} of {size} bytes). Fetch it again."
                )
            tensors.append(stored)
    except FileNotFoundError as error:
        raise StarmergeError(f"{file} is missing.") from error
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StarmergeError(f"{broken}: {error}. Fetch it again.") from error
    except RecursionError as error:
        raise StarmergeError(f"{broken}: its header is too deep.") from error
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


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name occurs twice in the header")
    return names


def _read_pickle(file: Path) -> list[_Unpickled]:
    try:
        zipped = zipfile.is_zipfile(file)  # as torch writes since 1.6; only those can be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError as error:
        raise StarmergeError(f"{file} is missing.") from error
    except pickle.UnpicklingError as error:
        raise StarmergeError(
            f"{file} would run code when it is loaded, so it is not loaded. Ask its author for "
            f"safetensors, or convert it where you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise StarmergeError(f"{file} is not a complete PyTorch file: {error}") from error
    if not isinstance(content, dict) or not all(torch.is_tensor(t) for t in content.values()):
        raise StarmergeError(f"{file} is not a dictionary of tensors.")
    for name, tensor in content.items():
        if tensor.dtype not in DTYPE_CODES or tensor.layout != torch.strided or tensor.is_meta:
            raise StarmergeError(
                f"{file}: tensor {name} ({tensor.dtype}, {tensor.layout}) cannot be stored in "
                "safetensors, nor merged."
            )
    return [
        _Unpickled(name, tensor.dtype, tuple(tensor.shape), file, tensor.detach())
        for name, tensor in content.items()
    ]
