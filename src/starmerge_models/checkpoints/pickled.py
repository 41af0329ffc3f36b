"""``.bin`` files of ``torch.save``: finding the tensors without running code of the file.

Since torch 1.6 such a file is a zip archive: ``data.pkl`` describes tensors as views of storages,
and each storage is an uncompressed record ``data/KEY``. Older files are a series of pickles,
followed by the storages. Source of both: github.com/pytorch/pytorch, ``torch/serialization.py`` and
``torch/_utils.py``.

The unpickler replaces the functions that rebuild plain tensors, by their names, with functions that
return descriptions. So the claims of a file are checked against its content before memory is
allocated. It is the unpickler written in Python, because the one in C allocates any length that a
pickle claims.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from typing import Any, ClassVar

import torch

from starmerge_models.errors import StarmergeError
from starmerge_models.storage import Place, storage_of

_LONGEST_PICKLE = 2**23
"""Most bytes of a pickle, enough for 50,000 tensors."""

_LONGEST_DIRECTORY = 2**23
"""Most bytes of an archive's directory, enough for 100,000 records."""

_MOST_COMPRESSED = 2**30
"""Most bytes of a file's compressed records after decompression, because they are held in
memory."""

_MOST_DIMENSIONS = 64

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
"""The numbers at the beginning of files from before torch 1.6."""

_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
"""Names of torch's storage classes, and their dtypes."""

_OPCODES = (
    pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK + pickle.POP
    + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE
    + pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG1 + pickle.BINFLOAT
    + pickle.BINUNICODE + pickle.SHORT_BINUNICODE + pickle.BINSTRING + pickle.SHORT_BINSTRING
    + pickle.BINBYTES + pickle.SHORT_BINBYTES
    + pickle.EMPTY_TUPLE + pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
    + pickle.EMPTY_LIST + pickle.APPEND + pickle.APPENDS + pickle.EMPTY_DICT
    + pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE + pickle.BINGET + pickle.LONG_BINGET
    + pickle.GLOBAL + pickle.STACK_GLOBAL + pickle.REDUCE + pickle.BINPERSID
)  # fmt: skip
"""Opcodes of pickles of tensors, in addition to those that :class:`_Unpickler` overrides."""


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a ``.bin`` file: a view of one of its storages."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Entries from one to the next, along each dimension."""
    offset: int
    """Byte offset of the first entry, in the file, or in ``storage`` if it is set."""
    storage: bytearray | None
    """The storage, if it was compressed."""


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    nbytes: int


@dataclass(frozen=True)
class _View:
    storage: _Storage
    dtype: torch.dtype
    offset: int
    """Offset in entries, like the strides."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Record:
    """The place of a storage's bytes."""

    offset: int
    nbytes: int
    content: bytearray | None = None


class _ForeignError(Exception):
    """A pickle contains something that is not part of a plain tensor."""


def read_pickle(file: Place) -> list[PickledTensor]:
    """Find the tensors of a ``.bin`` file.

    Raises:
        StarmergeError: The file is missing, broken, of another kind, or would run code; a tensor is
            larger than its storage, or a storage has another size than declared.
    """
    try:
        with storage_of(file).stream(file) as stream:
            content, find = _read_zip(stream) if _is_zip(stream) else _read_old(stream)
            return list(_tensors(content, find))
    except FileNotFoundError as error:
        raise StarmergeError(f"{file} is missing.") from error
    except _ForeignError as error:
        raise StarmergeError(f"{file} {error}") from error
    except StarmergeError as error:
        raise error if str(file) in str(error) else StarmergeError(f"{file}: {error}") from error
    except OSError as error:
        raise StarmergeError(f"{file} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # whatever a broken archive or pickle makes Python raise
        reason = str(error)[:200] or type(error).__name__
        raise StarmergeError(
            f"{file} is not a complete PyTorch file: {reason}. Fetch it again."
        ) from error


def _tensors(content: Any, find: Callable[[_Storage], _Record]) -> Iterator[PickledTensor]:
    if not isinstance(content, dict) or not all(isinstance(v, _View) for v in content.values()):
        raise _ForeignError(
            "is not a dictionary of tensors. If it holds one (as checkpoints of a training do), "
            "save that alone."
        )
    records: dict[str, tuple[_Storage, _Record]] = {}
    for name, view in content.items():
        if not isinstance(name, str):
            raise _ForeignError(f"calls a tensor {name!r}, which is no text. Save it with names.")
        storage = view.storage
        known, record = records.get(storage.key) or (storage, find(storage))
        records[storage.key] = known, record
        if known != storage or record.nbytes != storage.nbytes:
            raise _ForeignError(
                f"holds {record.nbytes} bytes for tensor {name}, whose storage is said to have "
                f"{storage.nbytes}. The file is damaged: fetch it again."
            )
        _check_view(name, view)
        start = record.offset + view.offset * view.dtype.itemsize
        yield PickledTensor(name, view.dtype, view.shape, view.stride, start, record.content)


def _check_view(name: str, view: _View) -> None:
    """Check that a tensor is within its storage and does not have more entries."""
    numbers = (view.offset, *view.shape, *view.stride)
    if (
        len(view.shape) != len(view.stride)
        or len(view.shape) > _MOST_DIMENSIONS
        or not all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    ):
        raise _ForeignError(f"gives tensor {name} a strange shape or place. Fetch it again.")
    size = math.prod(view.shape)
    last = sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
    wanted = max(size, view.offset + last + 1) if size else 0
    if wanted * view.dtype.itemsize > view.storage.nbytes:
        raise _ForeignError(
            f"gives tensor {name} the shape {list(view.shape)}, for which its storage of "
            f"{view.storage.nbytes} bytes is too small. If it was expanded, save a copy of it; "
            "else the file is damaged."
        )


class _Unpickler(pickle._Unpickler):
    """Reads a pickle of tensors as descriptions."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        op: pickle._Unpickler.dispatch[op] for op in _OPCODES
    }

    def __init__(self, content: bytes | io.BytesIO) -> None:
        super().__init__(
            io.BytesIO(content) if isinstance(content, bytes) else content, encoding="utf-8"
        )
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a function or class of plain tensors."""
        found = _KNOWN.get((module, name))
        if found is not None:
            return found
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        asked = f"{module}.{name}"[:200]
        if module.partition(".")[0] == "torch":
            raise _ForeignError(
                f"holds something that is no plain tensor ({asked}), which can be neither stored "
                "in safetensors nor merged."
            )
        raise _ForeignError(
            f"would run code when it is loaded ({asked}), so it is not loaded. Ask its author for "
            "safetensors, or convert it where you trust it."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the description of a storage, which the pickle references by its key."""
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise _ForeignError("holds more than tensors. Save the tensors alone.")
        if type(numel) is not int or numel < 0 or any(part is not None for part in view):
            raise pickle.UnpicklingError(f"the storage {key} has a strange size")
        storage = _Storage(dtype, key, numel * dtype.itemsize)
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"the storage {key} is there twice")
        return storage

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def _set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        # The hash of a deeply nested tuple would overflow Python's stack.
        if not isinstance(key, str | int):
            raise pickle.UnpicklingError(f"a key is a {type(key).__name__}")
        self.stack[-1][key] = value

    def _build(self) -> None:
        self.stack.pop()  # attributes, such as the _metadata of a model's state

    dispatch |= {
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.BUILD[0]: _build,
    }


def _view(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _View:
    return _typed_view(storage, offset, shape, stride, None, None, storage.dtype, *rest)


def _typed_view(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> _View:
    fits = isinstance(storage, _Storage) and isinstance(dtype, torch.dtype)
    if not fits or type(shape) is not tuple or type(stride) is not tuple:
        raise pickle.UnpicklingError("a tensor is no view of a storage")
    return _View(storage, dtype, offset, shape, stride)


def _of_type(rebuild: Callable[..., _View], kind: Any, arguments: Any, state: Any) -> _View:
    if rebuild not in (_view, _typed_view):
        raise pickle.UnpicklingError("a tensor is no view of a storage")
    return rebuild(*arguments)


def _first(value: Any, *rest: Any) -> Any:
    return value


def _empty() -> dict[Any, Any]:
    return {}


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _empty,
    ("torch", "Size"): _first,
    ("torch", "Tensor"): "Tensor",
    ("torch.nn.parameter", "Parameter"): "Parameter",
    ("torch._utils", "_rebuild_tensor"): _view,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_view,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
}
"""Replacements of the functions and classes in pickles of tensors. They never copy their arguments,
because a pickle may call them any number of times."""


def _is_zip(stream: RawIOBase) -> bool:
    """Return whether a file is an archive; refuse archives with a too long directory."""
    end = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, end - 2**16 - 100))
    tail = stream.read(2**16 + 100) or b""
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) - place < 22:
        stream.seek(0)
        if stream.read(4) == b"PK\3\4":
            raise zipfile.BadZipFile("the archive is cut off")
        return False
    (length,) = struct.unpack_from("<I", tail, place + 12)
    larger = tail.rfind(b"PK\6\6", 0, place)
    if larger >= 0 and place - larger >= 56:
        (length,) = struct.unpack_from("<Q", tail, larger + 40)
    if length > _LONGEST_DIRECTORY:
        raise StarmergeError(
            f"the archive's directory is longer than {_LONGEST_DIRECTORY:,} bytes. Convert the "
            "file to safetensors."
        )
    return True


def _read_zip(stream: RawIOBase) -> tuple[Any, Callable[[_Storage], _Record]]:
    """Return the content of an archive's pickle, and a function that finds storages."""
    archive = zipfile.ZipFile(stream)
    records = {info.filename: info for info in archive.infolist()}
    if len(records) < len(archive.infolist()):
        raise zipfile.BadZipFile("a record is there twice")
    tops = [name.partition("/")[0] for name in records if name.partition("/")[2] == "data.pkl"]
    if len(tops) != 1:
        raise zipfile.BadZipFile("it holds no data.pkl, or several")
    top = tops[0]
    if f"{top}/constants.pkl" in records:
        raise _ForeignError("is a program (TorchScript). Give the weights of the model alone.")
    order = records.get(f"{top}/byteorder")
    if order is not None and _unpacked(archive, order, 16) != b"little":
        raise _ForeignError("was written by a big-endian machine. Convert it there to safetensors.")
    content = _Unpickler(_unpacked(archive, records[f"{top}/data.pkl"], _LONGEST_PICKLE)).load()
    left = _MOST_COMPRESSED

    def find(storage: _Storage) -> _Record:
        nonlocal left
        info = records.get(f"{top}/data/{storage.key}")
        if info is None:
            raise zipfile.BadZipFile(f"the record {top}/data/{storage.key[:200]} is missing")
        if info.file_size != storage.nbytes:
            return _Record(0, info.file_size)
        if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
            if info.compress_size != info.file_size:
                raise zipfile.BadZipFile(f"the record {info.filename} has two sizes")
            return _Record(_place(stream, info), info.file_size)
        left -= info.file_size
        if left < 0:
            raise StarmergeError(
                f"its compressed records come to more than {_MOST_COMPRESSED:,} bytes, which would "
                "have to be held in memory. Save it with torch.save, or as safetensors."
            )
        content = _unpacked(archive, info, info.file_size)
        return _Record(0, len(content), bytearray(content))

    return content, find


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    """Read a record of at most ``most`` bytes, and check its declared size and CRC."""
    if info.file_size > most:
        raise StarmergeError(
            f"the record {info.filename} has {info.file_size:,} bytes, and {most:,} are read at "
            "most. Convert the file to safetensors."
        )
    try:
        with archive.open(info) as record:
            content = record.read(most + 1)
    except zlib.error as error:
        raise zipfile.BadZipFile(f"the record {info.filename} is damaged") from error
    if len(content) != info.file_size:
        raise zipfile.BadZipFile(f"the record {info.filename} is cut off")
    return content


def _place(stream: RawIOBase, info: zipfile.ZipInfo) -> int:
    """Return the byte offset of an uncompressed record in the file."""
    stream.seek(info.header_offset)
    head = stream.read(30) or b""
    if len(head) < 30 or head[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(f"the record {info.filename} is not where the directory says")
    name, extra = struct.unpack_from("<HH", head, 26)
    start: int = info.header_offset + 30 + name + extra
    if stream.read(name) != info.orig_filename.encode(
        "utf-8" if info.flag_bits & 0x800 else "cp437"
    ):
        raise zipfile.BadZipFile(f"the record {info.filename} has another name in its place")
    if start + info.file_size > stream.seek(0, io.SEEK_END):
        raise zipfile.BadZipFile(f"the record {info.filename} is cut off")
    return start


def _read_old(stream: RawIOBase) -> tuple[Any, Callable[[_Storage], _Record]]:
    """Return the content of a file from before torch 1.6, and a function that finds storages."""
    stream.seek(0)
    head = io.BytesIO(stream.read(_LONGEST_PICKLE) or b"")
    start = head.getvalue()[:20]
    if not start.startswith(b"\x80"):
        raise _ForeignError("is no file of torch.save: neither an archive nor a pickle.")
    if (_Unpickler(head).load(), _Unpickler(head).load()) != (_MAGIC, _VERSION):
        raise _ForeignError("is a pickle, but none of torch.save. Save the tensors with it.")
    if not _Unpickler(head).load().get("little_endian"):
        raise _ForeignError("was written by a big-endian machine. Convert it there to safetensors.")
    unpickler = _Unpickler(head)
    content = unpickler.load()
    keys = _Unpickler(head).load()
    place, end = head.tell(), stream.seek(0, io.SEEK_END)
    records: dict[str, _Record] = {}
    for key in keys:
        storage = unpickler.storages[key]
        stream.seek(place)
        (numel,) = struct.unpack("<q", stream.read(8))
        if numel < 0:
            raise pickle.UnpicklingError(f"the storage {key} has a strange size")
        records[key] = _Record(place + 8, numel * storage.dtype.itemsize)
        place += 8 + records[key].nbytes
        if place > end:
            raise pickle.UnpicklingError(f"the storage {key} is cut off")
    return content, lambda storage: records[storage.key]
