"""Opening of a checkpoint's files: headers are read and checked, tensors are not read.

The format of safetensors files is that of github.com/huggingface/safetensors: eight bytes with the
length of a JSON header, the header, the tensors one after the other.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import Any

import torch

from starmerge_models.checkpoints.experts import expert_name, is_stack, stack_of
from starmerge_models.checkpoints.pickled import PickledTensor, read_pickle
from starmerge_models.checkpoints.tensors import (
    DTYPE_CODES,
    DTYPES,
    Checkpoint,
    StoredTensor,
    TensorInfo,
    UnpackedTensor,
)
from starmerge_models.errors import StarmergeError
from starmerge_models.parsing import MOST_JSON_BYTES, parse_json
from starmerge_models.reading import read_json
from starmerge_models.storage import Place, exists, storage_of

DIFFUSION_STEM = "diffusion_pytorch_model"
"""Prefix of the names of diffusers' weight files."""

_MOST_TENSORS = 250_000
"""Most tensors in one file. A million take a process gigabytes of memory."""

_LONGEST_NAME = 1000
"""Most bytes of a tensor's name."""

_LONGEST_LAYER = 18
"""Most digits of a number in a name, so that it fits into 64 bits."""


def open_checkpoint(folder: Place) -> Checkpoint:
    """Read the headers of a model's weights in a folder.

    The files are searched in this order: ``model.safetensors``, ``model.safetensors.index.json``,
    the same for diffusers' ``diffusion_pytorch_model``, ``pytorch_model.bin``,
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
    """Read the descriptions of tensors in one ``.bin`` file, without running its code.

    Raises:
        StarmergeError: The file is missing, broken, or asks for code to be run.
    """
    return Checkpoint(_by_expert(_read_pickle(file)), mapped=False)


def open_weights(file: Place) -> Checkpoint:
    """Read the header of one file of weights: safetensors, or a pickle for any other suffix.

    Raises:
        StarmergeError: The file is missing or broken, or asks for code to be run.
    """
    is_pickled = file.suffix.lower() != ".safetensors"
    return open_pickle(file) if is_pickled else open_safetensors(file)


def open_shards(file: Place) -> Checkpoint:
    """Read the headers of safetensors shards, such as those of an adapter.

    Args:
        file: The index, or without an index any shard, ``NAME-00001-of-00003.safetensors``.

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
    """Yield tensors, with joined experts split into single ones."""
    whole, left = list(tensors), _MOST_TENSORS
    for tensor in whole:
        left -= tensor.shape[0] if is_stack(tensor.name, tensor.shape) else 0
        if left < 0:
            raise StarmergeError(
                f"{tensor.file} and what belongs to it hold more than {_MOST_TENSORS:,} experts, "
                "which are the most that are read."
            )
    for tensor in whole:
        if not is_stack(tensor.name, tensor.shape):
            yield tensor
            continue
        for expert in range(tensor.shape[0]):
            yield replace(tensor.item(expert_name(tensor.name, expert), expert), origin=None)


def _read_shards(
    index: Place, read: Callable[[Place], Iterable[StoredTensor | UnpackedTensor]]
) -> Iterator[StoredTensor | UnpackedTensor]:
    """Yield the tensors of all shards of an index, after checking them against the index."""
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


def _read_safetensors(file: Place) -> list[StoredTensor]:
    return _read_header(file)[1]


def _read_header(file: Place) -> tuple[dict[str, str], list[StoredTensor]]:
    """Return the metadata of a safetensors file, and its tensors in order."""
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
    except OSError as error:
        raise StarmergeError(f"{file} cannot be read: {error.strerror}.") from error
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
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
) -> StoredTensor:
    """Check an entry of a header, given the file's size and the offset of its tensors."""
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
    stored = StoredTensor(name, dtype, tuple(shape), file, begin + start)
    # Check the partial products, like safetensors, which overflow even before a final zero.
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
    """Refuse names that are too long, and layer numbers beyond 64 bits."""
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


def _read_pickle(file: Place) -> list[StoredTensor | UnpackedTensor]:
    return [_unpickled(file, tensor) for tensor in read_pickle(file)]


def _unpickled(file: Place, found: PickledTensor) -> StoredTensor | UnpackedTensor:
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
            return UnpackedTensor(name, dtype, shape, file, torch.empty(shape, dtype=dtype))
        entries = torch.frombuffer(found.storage, dtype=torch.uint8)[found.offset :]
        entries = entries[: len(entries) // dtype.itemsize * dtype.itemsize].view(dtype)
        return UnpackedTensor(name, dtype, shape, file, entries.as_strided(shape, found.stride))
    rows = tuple(accumulate(shape[:0:-1], mul, initial=1))[::-1] if shape else ()
    is_plain = all(n == 1 or a == b for n, a, b in zip(shape, found.stride, rows, strict=True))
    stride = None if is_plain or not math.prod(shape) else found.stride
    return StoredTensor(name, dtype, shape, file, found.offset, stride)
