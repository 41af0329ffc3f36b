"""An on-disk cache of model responses, keyed by a hash of everything that determines them.

The cache holds raw responses. Parsed answers and scores are recomputed on every run.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

from blake3 import blake3

from starmerge_models import deltas
from starmerge_models.checkpoints.hashing import cached_blake3_of
from starmerge_models.merging import apply, fold
from starmerge_models.storage.publishing import REPORT
from starmerge_models.versions import installed_versions

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "jinja2",
    "peft",
    "pillow",
    "vllm",
)
"""Distributions whose versions are part of the cache key."""

_IGNORED_FILES = (
    ".*",
    "*.md",
    "checkpoint-*",
    "LICENSE*",
    "NOTICE*",
    "README*",
    REPORT,
    # written by training runs
    "optimizer.*",
    "rng_state*",
    "scheduler.*",
    "trainer_state.json",
    "training_args.bin",
)
"""Files of a model's folder that do not affect its answers; every other file counts."""

_UPDATE_CODE = (deltas, fold, apply)
"""Modules that add an update to the weights of a loaded model."""

_NAME = re.compile(r"[0-9a-f]{64}\.jsonl")
_PARTIAL = ".partial-"


Record = Mapping[str, Any]
"""A model's answer to a row, as JSON-serialisable data."""


def score_key(
    folders: Sequence[Path],
    asked: Mapping[str, Any],
    *,
    device: str,
    dtype: str,
    update: str | None = None,
) -> str:
    """Return the cache key of a model's answers to a task: a hash of everything they depend on.

    The hash covers the content of the model's files (not their paths); the update added to its
    weights in memory (its content, not the method that produced it) and the code that adds it;
    task, device and dtype; the versions of the packages that compute; and the code of
    :mod:`starmerge_models.evaluation`, so that no entry is stale after a change of the code.

    Args:
        folders: The folders of the model: a whole model's, or a base's and its adapter's.
        asked: Task, rows, scorer and its settings, JSON-serialisable.
        device: Kind of the device, such as "cpu".
        dtype: Dtype that the weights are loaded in, such as "bfloat16".
        update: The hash of the update in memory, by
            :func:`starmerge_models.checkpoints.hashing.blake3_of_update`.
    """
    content = {
        "model": [_model_files(folder) for folder in folders],
        "update": update,
        "asked": dict(asked),
        "device": device,
        "dtype": dtype,
        "versions": versions(),
        "code": _code(*([] if update is None else _UPDATE_CODE)),
    }
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()


class ScoreCache:
    """A folder of answers, safe for concurrent readers and writers.

    Each key has a JSONL file: a line with a checksum, then one record per line. Files are renamed
    into place, and a file whose checksum does not match is treated as missing.

    Args:
        folder: The folder; by default one in the user's cache directory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = _user_folder() if folder is None else folder

    def get(self, key: str) -> list[Record] | None:
        """Return the records stored under a key of :func:`score_key`, in order, or None."""
        try:
            head, _, body = self._file(key).read_bytes().partition(b"\n")
        except OSError:
            return None
        if head != _head(key, body):
            return None
        return [json.loads(line) for line in body.splitlines()]

    def put(self, key: str, records: Sequence[Record]) -> None:
        """Store records under a key, replacing an existing entry.

        A failed write is a warning, not an error, so that the answers are not lost.
        """
        body = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                prefix=_PARTIAL, dir=self.folder, ignore_cleanup_errors=True
            ) as scratch:
                partial = Path(scratch) / "file"
                partial.write_bytes(_head(key, body) + b"\n" + body)
                partial.replace(self._file(key))
        except OSError as error:
            warnings.warn(
                f"The answers could not be cached in {self.folder}, and the next run will compute "
                f"them again: {error}",
                stacklevel=2,
            )

    @property
    def size(self) -> int:
        """Total size of the entries in bytes."""
        return sum(file.stat().st_size for file in self._files())

    def clear(self) -> int:
        """Delete all entries and the partial files of killed processes; return how many entries."""
        files = self._files()
        for file in files:
            file.unlink(missing_ok=True)
        for scratch in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(scratch, ignore_errors=True)
        return len(files)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.jsonl"

    def _files(self) -> list[Path]:
        return [file for file in self.folder.glob("*.jsonl") if _NAME.fullmatch(file.name)]


def blake3_of_model(folder: Path) -> str:
    """Return one hash of all files of a folder that affect a model's answers.

    It is the hash of a JSON object of the files' hashes by name; the folder's path does not count.
    """
    return blake3(json.dumps(_model_files(folder), sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that compute answers."""
    return installed_versions(_PACKAGES)


def _head(key: str, body: bytes) -> bytes:
    """Return a file's first line: a checksum over key and body, so that a renamed file fails."""
    return json.dumps({"blake3": blake3(key.encode() + body).hexdigest()}).encode()


def _model_files(folder: Path) -> dict[str, str]:
    """Return the hashes of the files that affect a model's answers, by file name."""
    files = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    return {
        path.as_posix(): cached_blake3_of(file)
        for path, file in files.items()
        if not any(fnmatchcase(part, pattern) for part in path.parts for pattern in _IGNORED_FILES)
    }


def _code(*modules: ModuleType) -> list[str]:
    """Return the hashes of the source files of this package and of some other modules."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    others = [Path(str(module.__file__)) for module in modules]
    return [cached_blake3_of(file) for file in [*files, *others]]


def _user_folder() -> Path:
    from platformdirs import user_cache_path  # noqa: PLC0415  (only where no folder is given)

    return user_cache_path("starmerge") / "scores"
