"""Sources of rows: Hub datasets, local files, generators; their splits and samples."""

from __future__ import annotations

import csv
import hashlib
import importlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from starmerge_models import plugins
from starmerge_models.errors import UsageError, nearest
from starmerge_models.parsing import parse_json
from starmerge_models.storage import exists

Split = Literal["train", "test"]

DATA_SEED = 42
"""Seed of generators, and of the share of a Hub split that is held out."""

Row = tuple[str, dict[str, Any]]
"""A row's id in its source, and its fields."""

_Row = TypeVar("_Row")

_STEP = re.compile(r"\[(\d+)\]|\.?(\w+)")


class Data(BaseModel):
    """Part of a task file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Source(Data):
    """A source of rows."""

    def beside(self, folder: Path) -> Self:
        """Return the source with its relative paths resolved against a folder."""
        places: dict[str, Any] = {}
        for key in type(self).model_fields:
            value = getattr(self, key)
            if isinstance(value, Path):
                places[key] = (folder / value).absolute()
            elif key == "generator" and isinstance(value, str):
                places[key] = plugins.absolute_reference(value, folder.absolute())
        return self.model_copy(update=places)

    def with_all_rows(self) -> Self:
        """Return the source without a held-out share, so that all rows of its file are scored.

        A source that holds no share of a file out is returned unchanged.
        """
        return self


class HubSource(Source):
    """Rows of a dataset on the Hugging Face Hub, by the library ``datasets``."""

    hub: str
    """The dataset's id."""
    config: str | None = None
    split: str = "test"
    """Split with the rows to score."""
    train_split: str | None = None
    """Split with the training rows."""
    revision: str | None = None
    """Branch, tag or commit of the dataset."""
    data_dir: str | None = None
    """Sub-folder of the repository, where its parts are folders."""
    test_share: float | None = Field(default=None, gt=0, lt=1)
    """Score this share of ``split``, chosen by seed 42, and train on the rest."""
    note: str | None = None
    """Hint for the error message of a dataset that is hard to download."""


class FileSource(Source):
    """Rows of local files: JSONL, CSV with a header, or Parquet, by suffix."""

    file: Path
    """File with the rows to score; a relative path is resolved against the task file's folder."""
    train_file: Path | None = None
    """File with the training rows."""
    held_out: float | None = Field(default=None, gt=0, lt=1)
    """Score this share of ``file``, chosen by a hash of ``key``, and train on the rest."""
    key: str = "input"
    """Field that identifies a row where a share is held out."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps the task's field names to the file's columns."""

    @model_validator(mode="after")
    def _one_way_to_split(self) -> FileSource:
        if self.train_file is not None and self.held_out is not None:
            raise ValueError("give train_file or held_out, not both")
        return self

    def with_all_rows(self) -> Self:
        """Return the source without a held-out share."""
        return self if self.held_out is None else self.model_copy(update={"held_out": None})


class GeneratorSource(Source):
    """Rows that a Python function makes: it gets a ``random.Random`` and yields dictionaries."""

    generator: str | Callable[..., Any]
    """``package.module:function``, ``path/to/file.py:function``, or the function itself."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share to score, chosen by a hash of ``key``; the rest are training rows."""
    key: str = "input"
    """Field that identifies a row."""


class Sample(Data):
    """The sample of a source's rows that is scored."""

    kind: Literal["all", "random", "balanced"] = "all"
    """``balanced``: as many rows of each label, capped at the rarest."""
    n: int | None = Field(default=None, ge=1)
    """Number of rows, or of rows of each label."""
    seed: int = 42
    """Seed of the rows' order, for every kind."""

    @model_validator(mode="after")
    def _n_fits_the_kind(self) -> Sample:
        if (self.n is None) != (self.kind == "all"):
            raise ValueError("give n with random or balanced, and only with them")
        return self

    def shuffled(self, rows: Sequence[_Row]) -> list[_Row]:
        """Return all rows in the sample's order."""
        mixed = list(rows)
        random.Random(self.seed).shuffle(mixed)
        return mixed

    def take(
        self, rows: Sequence[_Row], label: Callable[[_Row], str], limit: int | None = None
    ) -> list[_Row]:
        """Return the sample of some rows, shuffled.

        Args:
            rows: At least one row.
            label: Returns a row's label.
            limit: Most rows; a balanced sample has the same number of each label within the
                limit, but at least one.
        """
        mixed = self.shuffled(rows)
        if self.kind != "balanced" or self.n is None:
            return mixed[: self.n][:limit]
        counts = Counter(map(label, mixed))
        each = min(self.n, *counts.values())
        if limit is not None:
            each = max(1, min(each, limit // len(counts)))
        taken: Counter[str] = Counter()
        chosen = []
        for row in mixed:
            taken[label(row)] += 1
            if taken[label(row)] <= each:
                chosen.append(row)
        return chosen


def describe(source: HubSource | FileSource | GeneratorSource) -> str:
    """Return the dataset, file or function of a source, for lists and errors."""
    if isinstance(source, HubSource):
        parts = [source.hub, source.config, source.data_dir, source.split]
        at = f" at {source.revision}" if source.revision else ""
        return " ".join(part for part in parts if part) + at
    if isinstance(source, FileSource):
        return str(source.file)
    return function_name(source.generator)


def function_name(generator: str | Callable[..., Any]) -> str:
    """Return the name of a generator: ``package.module:function``."""
    if callable(generator):
        return f"{generator.__module__}:{generator.__qualname__}"
    return generator


@singledispatch
def read_rows(source: Any, split: Split, task: str) -> list[Row]:
    """Read the rows of a split from a source, in the source's order.

    Args:
        source: The source.
        split: The split.
        task: The task's name, for errors.

    Raises:
        UsageError: The rows cannot be read.
    """
    raise NotImplementedError(type(source))


@read_rows.register
def _(source: HubSource, split: Split, task: str) -> list[Row]:
    wanted = source.split
    if split == "train" and source.test_share is None:
        if source.train_split is None:
            raise UsageError(f"Task {task} names no rows to train on (train_split in its source).")
        wanted = source.train_split
    try:
        import datasets  # noqa: PLC0415  (slow to import)
    except ImportError as error:
        raise UsageError(
            "Datasets of the Hub need the package datasets. Install it: "
            "pip install 'starmerge-models[eval]'."
        ) from error
    try:
        rows = datasets.load_dataset(
            source.hub,
            source.config,
            split=wanted,
            revision=source.revision,
            data_dir=source.data_dir,
        )
    except Exception as error:  # whatever datasets, the Hub's client and the network raise
        reason = " ".join(str(error).split()) or type(error).__name__
        note = f" {source.note}" if source.note else ""
        raise UsageError(
            f"Task {task}: the dataset {describe(source)} cannot be loaded: {reason.rstrip('.')}."
            f"{note} Or pass rows with the same columns from a file: --data {task}=rows.jsonl "
            "(.csv, .parquet)."
        ) from error
    if source.test_share is not None:
        parts = rows.train_test_split(test_size=source.test_share, seed=DATA_SEED)
        rows = parts[split]
    return [(f"{wanted}/{number}", row) for number, row in enumerate(rows)]


@read_rows.register
def _(source: FileSource, split: Split, task: str) -> list[Row]:
    file = source.file
    if split == "train" and source.held_out is None:
        if source.train_file is None:
            raise UsageError(
                f"Task {task} names no rows to train on (train_file or held_out in its source)."
            )
        file = source.train_file
    named = enumerate(read_named(file, source.columns), start=1)
    rows = [(f"{file.name}/{number}", row) for number, row in named]
    return rows if source.held_out is None else _split(rows, source.key, source.held_out, split)


@read_rows.register
def _(source: GeneratorSource, split: Split, task: str) -> list[Row]:
    function = function_of(source.generator)
    try:
        made = function(random.Random(DATA_SEED))
        rows = [(str(number), dict(row)) for number, row in enumerate(made)]
    except UsageError:
        raise
    except Exception as error:  # whatever the user's own function raises
        raise UsageError(
            f"Task {task}: the generator {describe(source)} failed: {type(error).__name__}: {error}"
        ) from error
    return _split(rows, source.key, source.held_out, split)


def split_sizes(source: Any, task: str) -> tuple[int, int] | None:
    """Return the number of held-out rows of a file, and of its training rows.

    Returns:
        None where no share of a file is held out.
    """
    if not isinstance(source, FileSource) or source.held_out is None:
        return None
    return len(read_rows(source, "test", task)), len(read_rows(source, "train", task))


def function_of(generator: str | Callable[..., Any]) -> Callable[[random.Random], Iterable[Any]]:
    """Return the function that a generator source names.

    Raises:
        UsageError: It cannot be imported.
        StarmergeError: Its file cannot be loaded.
    """
    if callable(generator):
        return generator
    module, _, name = generator.rpartition(":")
    try:
        if plugins.is_file_reference(generator):
            function = getattr(plugins.load_file(Path(module)), name)
        else:
            function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"The generator {generator!r} cannot be imported: {error}. Write "
            "package.module:function, of a package that is installed or on PYTHONPATH, or "
            "path/to/file.py:function."
        ) from error
    made: Callable[[random.Random], Iterable[Any]] = function
    return made


def _split(rows: list[Row], key: str, share: float, split: Split) -> list[Row]:
    """Return one split of the rows, without duplicates.

    Whether a row is held out depends on a hash of its key alone, so that neither a new release of
    the dataset or package nor another limit moves a row between the splits.
    """
    unique = {_text_at(row, key, place): (place, row) for place, row in rows}
    return [row for text, row in unique.items() if (split == "test") == is_held_out(text, share)]


def is_held_out(text: str, share: float) -> bool:
    """Return whether a row is held out, from a hash of its key."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_file(file: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a JSONL, CSV or Parquet file.

    Raises:
        UsageError: The file is missing, of another kind, or broken; the message names the line.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise UsageError(f"{file} is neither .jsonl nor .csv nor .parquet.")
    if not exists(file):
        raise UsageError(f"{file} does not exist.")
    if not file.is_file():
        raise UsageError(f"{file} is a folder, a pipe or a device. Give a file of rows.")
    try:
        rows = list(reader(file))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file}{_place_of_fault(file)} is not UTF-8: {error}. Save it as UTF-8."
        ) from error
    except csv.Error as error:
        raise UsageError(f"{file} is not a CSV file: {error}.") from error
    if not rows:
        raise UsageError(f"{file} has no rows.")
    return iter(rows)


def read_named(file: Path, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Read the rows of a file, with some columns also under other names.

    Args:
        file: JSONL, CSV or Parquet.
        columns: Maps the new names to the file's columns.

    Raises:
        UsageError: As :func:`read_file`; or a row lacks one of the columns.
    """
    for number, row in enumerate(read_file(file), start=1):
        for column in columns.values():
            if column not in row:
                raise UsageError(
                    f"{file}, row {number}: there is no column {column!r}. It has: "
                    f"{', '.join(row)}.{nearest(column, row)}"
                )
        yield {**row, **{name: row[column] for name, column in columns.items()}}


def _place_of_fault(file: Path) -> str:
    """Return the line or row of a file that is not UTF-8, for errors; "" if none is found."""
    if file.suffix.lower() != ".parquet":
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f", line {number}"
        return ""
    from pyarrow import parquet  # noqa: PLC0415

    table = parquet.read_table(file)
    for number in range(table.num_rows):
        try:
            table.slice(number, 1).to_pylist()
        except UnicodeDecodeError:
            return f", row {number + 1}"
    return ""


def _read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UsageError(
                    f"{file}, line {number}: not JSON ({error}). Mend the line, or leave it out."
                ) from error
            if not isinstance(row, dict):
                raise UsageError(f"{file}, line {number}: a row is an object with fields.")
            yield row


_LONGEST_FIELD = 2**30
"""Longest CSV field in characters; the csv module's default limit is 131,072."""


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_LONGEST_FIELD)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            raise UsageError(f"{file}: two columns have one name: {names}.")
        for row in reader:
            if None in row or None in row.values():
                raise UsageError(
                    f"{file}, line {reader.line_num}: other columns than {reader.fieldnames}."
                )
            yield row


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            f"{file}: Parquet files need the package pyarrow. Install it: "
            "pip install 'starmerge-models[eval]'."
        ) from error
    try:
        yield from parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{file} is not a Parquet file: {error}") from error


def look_up(fields: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path of a row, such as ``endings[0]``.

    Raises:
        LookupError: There is no such field.
    """
    value: Any = fields
    for index, name in _STEP.findall(path):
        # A str is a sequence too, and an index would return a character.
        if not isinstance(value, Mapping if name else Sequence) or isinstance(value, str):
            raise LookupError(path)
        try:
            value = value[int(index)] if index else value[name]
        except LookupError as error:
            raise LookupError(path) from error
    return value


def missing_marker(value: Any) -> str | None:
    """Return "null" or "NaN" for a missing value; None for any other value."""
    if value is None:
        return "null"
    return "NaN" if isinstance(value, float) and math.isnan(value) else None


def text_of(value: Any) -> str:
    """Return a field of a row as text: 1.0 becomes "1", and None the empty string."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _text_at(row: dict[str, Any], key: str, place: str) -> str:
    try:
        text = text_of(look_up(row, key))
        text.encode()
        return text
    except UnicodeEncodeError as error:
        raise UsageError(f"Row {place}: {key!r} holds half a character: {error}.") from error
    except LookupError as error:
        raise UsageError(
            f"Row {place} has no field {key!r}, by which rows are identified."
        ) from error
