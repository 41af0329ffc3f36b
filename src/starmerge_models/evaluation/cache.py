"""Answers kept on disk by all that decides them, so that no model is asked twice.

What is kept is what the model wrote, not what was read in it: readings and scores are made anew.
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
"""What computes answers, by the names of the distributions."""

_NO_PART = (
    ".*",
    "*.md",
    "checkpoint-*",
    "LICENSE*",
    "NOTICE*",
    "README*",
    REPORT,
    # what a training run leaves
    "optimizer.*",
    "rng_state*",
    "scheduler.*",
    "trainer_state.json",
    "training_args.bin",
)
"""Files of a model's folder that have no part in its answers; what is not known has one."""

_ADDING = (deltas, fold, apply)
"""What adds an update to the weights of a loaded model."""

_NAME = re.compile(r"[0-9a-f]{64}\.jsonl")
_PARTIAL = ".partial-"


Record = Mapping[str, Any]
"""What a model answered to a row, as JSON can hold it."""


def score_key(
    folders: Sequence[Path],
    asked: Mapping[str, Any],
    *,
    device: str,
    dtype: str,
    update: str | None = None,
) -> str:
    """Return a hash of all that decides a model's answers to a task.

    These are the content of the model's files, but not their place, and of what is added to its
    weights in memory; what is asked, device and dtype, as they are given; the versions of the
    packages that compute; and the code of :mod:`starmerge_models.evaluation` itself, so that
    nothing is stale between two releases either. Of an update in memory the content decides,
    whatever merged it, and the code that adds it to the weights.

    Args:
        folders: What makes the model: a whole model's folder, a base's and its adapter's.
        asked: What is asked and how: task, rows, scorer and its settings. JSON must be able to
            hold it.
        device: Kind of the device, such as "cpu".
        dtype: Of the weights as they are computed with, such as "bfloat16".
        update: The hash of what is added to the model's weights in memory, by
            :func:`starmerge_models.checkpoints.hashing.blake3_of_update`.
    """
    content = {
        "model": [_model_files(folder) for folder in folders],
        "update": update,
        "asked": dict(asked),
        "device": device,
        "dtype": dtype,
        "versions": versions(),
        "code": _code(*([] if update is None else _ADDING)),
    }
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()


class ScoreCache:
    """A folder of answers; several processes may read and write it at once.

    It has a JSONL file for each key: a line with a checksum, then a record a line. A file appears
    whole; one that is torn or damaged all the same counts as absent.

    Args:
        folder: Where the files lie; by default in the user's cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = _user_folder() if folder is None else folder

    def get(self, key: str) -> list[Record] | None:
        """Return the records kept under a key of :func:`score_key`, in their order, or None."""
        try:
            head, _, body = self._file(key).read_bytes().partition(b"\n")
        except OSError:
            return None
        if head != _head(key, body):
            return None
        return [json.loads(line) for line in body.splitlines()]

    def put(self, key: str, records: Sequence[Record]) -> None:
        """Keep records under a key, in place of what is there.

        If the disk does not take them, that is a warning: they are worth more than the cache.
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
                f"The answers could not be kept in {self.folder}, and will be asked for again next "
                f"time: {error}",
                stacklevel=2,
            )

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self._files())

    def clear(self) -> int:
        """Delete all files, and what killed processes left; return how many files went."""
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
    """Return one hash of all files of a folder that have a part in a model's answers.

    That of a JSON object of their hashes by name; where the folder lies does not count.
    """
    return blake3(json.dumps(_model_files(folder), sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute answers, of those that are installed."""
    return installed_versions(_PACKAGES)


def _head(key: str, body: bytes) -> bytes:
    """Return a file's first line; the key has a part in it, so that no file passes for another."""
    return json.dumps({"blake3": blake3(key.encode() + body).hexdigest()}).encode()


def _model_files(folder: Path) -> dict[str, str]:
    """Return the hashes of what has a part in a model's answers, by file name."""
    files = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    return {
        path.as_posix(): cached_blake3_of(file)
        for path, file in files.items()
        if not any(fnmatchcase(part, pattern) for part in path.parts for pattern in _NO_PART)
    }


def _code(*modules: ModuleType) -> list[str]:
    """Return the hashes of the files of this package, and of some modules."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    others = [Path(str(module.__file__)) for module in modules]
    return [cached_blake3_of(file) for file in [*files, *others]]


def _user_folder() -> Path:
    from platformdirs import user_cache_path  # noqa: PLC0415  (only where no folder is given)

    return user_cache_path("starmerge") / "scores"
