"""Verification of a merge against its report: its files, its inputs, and a repeated merge."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from starmerge_models.checkpoints.hashing import blake3_of, blake3_of_contents, blake3_of_tensor
from starmerge_models.checkpoints.opening import open_safetensors, open_weights
from starmerge_models.checkpoints.source import folder_of, resolve
from starmerge_models.checkpoints.tensors import TensorInfo, read_tensor
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.engine import MergeRun
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.outputs.output import digests_by_file
from starmerge_models.merging.plan import Plan, make_plan
from starmerge_models.merging.report import SCHEMA
from starmerge_models.progress import progress_bar
from starmerge_models.reading import read_json
from starmerge_models.recipe import make_recipe
from starmerge_models.storage import Place, exists, is_file, place_of, storage_of
from starmerge_models.storage.local_folder import LocalFolder
from starmerge_models.storage.publishing import REPORT

Repeat = Literal["none", "sample", "all"]

_SAMPLE = 8
"""Number of merged tensors in a sample, and of copied ones."""


class _Input(BaseModel):
    name: str
    reference: str
    blake3: dict[str, str]
    tensors: dict[str, str]


class _Report(BaseModel):
    """The parts of a report that verification reads."""

    files: list[str]
    digests: dict[str, dict[str, str]]
    contents: dict[str, str]
    blake3: dict[str, str] = {}
    inputs: list[_Input]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The result of a verification."""

    path: str
    tensors: int
    """Number of tensors whose bytes have been compared with the report."""
    wrong: list[str] = field(default_factory=list)
    """A sentence for each file or tensor of the merge that differs from the report."""
    inputs: dict[str, str] = field(default_factory=dict)
    """For each input file "same", "changed" or "missing"; empty if inputs were not checked."""
    repeated: int = 0
    """Number of tensors that were merged again."""
    different: list[str] = field(default_factory=list)
    """Names of the repeated tensors with other bytes; if all were repeated, also of tensors that
    the repeated merge lacks."""
    unlisted: list[str] = field(default_factory=list)
    """Files in the folder that are not in the report, because they were added later."""
    not_repeated: str | None = None
    """The reason why the requested repetition was not possible."""

    @property
    def is_right(self) -> bool:
        """Whether the merge is as reported; missing inputs and additional files are allowed."""
        changed = "changed" in self.inputs.values()
        return not (self.wrong or self.different or changed or self.not_repeated)

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        return {"is_right": self.is_right, **asdict(self)}


def verify(
    path: str | Place,
    *,
    inputs: bool = True,
    repeat: Repeat = "none",
    threads: int | None = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> Verdict:
    """Compare a merged folder with its report, byte by byte; the model card may be edited.

    Args:
        path: The folder.
        inputs: Hash the input files too, if they exist under the names in the report.
        repeat: Merge again and compare: "sample" repeats some randomly drawn tensors, "all" repeats
            all. Surveys of methods cover the whole model in both. For an adapter "sample" repeats
            all tensors.
        threads: As for :func:`starmerge_models.merge`.
        memory: As for :func:`starmerge_models.merge`.
        progress: Show a progress bar on standard error.

    Raises:
        UsageError: The folder does not exist, has no report, or one of another version.
        StarmergeError: The report is broken, or a file cannot be read.
    """
    folder = place_of(path)
    report = read_report(folder)
    try:
        checked, wrong = _check_output(folder, report, progress)
        unlisted = [name for name in storage_of(folder).tree(folder) if name not in report["files"]]
        verdict = Verdict(str(folder), checked, wrong, unlisted=unlisted)
        if inputs:
            verdict = replace(verdict, inputs=dict(_check_inputs(report, progress)))
    except OSError as error:
        raise StarmergeError(f"{folder} cannot be verified: {error}.") from error
    if repeat == "none":
        return verdict
    try:
        repeated, different = _repeat_merge(
            report, folder, repeat, Threads(threads, memory), progress
        )
    except StarmergeError as error:
        return replace(verdict, not_repeated=str(error))
    return replace(verdict, repeated=repeated, different=different)


def read_report(folder: Place) -> dict[str, Any]:
    """Read the report of a merged folder.

    Raises:
        UsageError: The folder has no report, or one of another version.
        StarmergeError: The report is broken.
    """
    file = folder / REPORT
    if not exists(folder):
        raise UsageError(f"{folder} does not exist. Give a folder that a merge wrote.")
    if not is_file(file):
        raise UsageError(f"{folder} has no {REPORT}, so it is no merge that starmerge wrote.")
    report = read_json(file)
    if report.get("schema") != SCHEMA or not isinstance(report.get("digests"), dict):
        raise UsageError(
            f"{file} has the schema {report.get('schema')!r}, and this starmerge reads {SCHEMA}. "
            "Verify it with the version that wrote it."
        )
    try:
        _Report.model_validate(report)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StarmergeError(f"{file} is broken at {place}: {first['msg']}.") from error
    return report


def check_files(folder: Place, report: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each wrong file of a merged folder, without reading the tensors.

    Wrong files are missing or truncated files, files with other tensors, dtypes or shapes, and
    files without tensors whose bytes differ.

    Args:
        folder: The folder.
        report: Its report; see :func:`read_report`.
    """
    wrong = [f"{name} is missing." for name in report["files"] if not is_file(folder / name)]
    wrong += [
        f"{name}: the bytes are not those that were written."
        for name, digest in report.get("blake3", {}).items()
        if is_file(folder / name) and blake3_of(folder / name) != digest
    ]
    for name, digests in report["digests"].items():
        if not is_file(folder / name):
            continue
        try:
            stored = open_safetensors(folder / name)
        except StarmergeError as error:
            if isinstance(error.__cause__, OSError):
                raise
            wrong.append(str(error))
            continue
        wrong += [f"{name}: the tensor {t} is missing." for t in digests if t not in stored]
        wrong += [
            f"{name}: the tensor {t} is not in the report." for t in stored if t not in digests
        ]
        known = blake3_of_contents((info, digests.get(t, "")) for t, info in stored.items())
        if stored.keys() == digests.keys() and known != report["contents"].get(name):
            wrong.append(f"{name}: the dtypes or shapes are not those that were written.")
    return wrong


def _check_output(
    folder: Place, report: Mapping[str, Any], progress: bool
) -> tuple[int, list[str]]:
    """Return the number of compared tensors, and a sentence for each difference."""
    wrong, checked = check_files(folder, report), 0
    for name, digests in report["digests"].items():
        try:
            stored = open_safetensors(folder / name) if is_file(folder / name) else {}
        except StarmergeError:  # check_files has reported it
            continue
        for tensor, digest in _hashed(stored.values(), progress):
            if digests.get(tensor.name, digest) != digest:
                wrong.append(f"{name}: the bytes of {tensor.name} are not those that were written.")
            checked += 1
    return checked, wrong


def _hashed(tensors: Collection[TensorInfo], progress: bool) -> Iterator[tuple[TensorInfo, str]]:
    """Yield tensors with the BLAKE3 of their bytes."""
    size, count = sum(tensor.nbytes for tensor in tensors), len(tensors)
    with progress_bar("verifying", size, show=progress, in_bytes=True, tensors=count) as phase:
        for tensor in tensors:
            began = time.monotonic()
            digest = blake3_of_tensor(read_tensor(tensor)).hexdigest()
            phase.tensor_done(tensor.name, tensor.nbytes, time.monotonic() - began)
            yield tensor, digest


def _contents(file: Place, progress: bool) -> str:
    """Return the BLAKE3 of a file's tensors."""
    return blake3_of_contents(_hashed(open_weights(file).values(), progress))


def _check_inputs(report: Mapping[str, Any], progress: bool) -> Iterator[tuple[str, str]]:
    for source in report["inputs"]:
        try:
            path = place_of(source["reference"])
            found = path if is_file(path) else resolve(source["reference"], may_be_file=True).path
            folder = folder_of(found)
        except StarmergeError:
            folder = None
        kinds = (("blake3", blake3_of), ("tensors", partial(_contents, progress=progress)))
        for digests, hashed in kinds:
            for name, digest in source[digests].items():
                file = None if folder is None else folder / name
                label = f"{source['name']}: {name}"
                if file is None or not is_file(file):
                    yield label, "missing"
                    continue
                try:
                    is_same = hashed(file) == digest
                except StarmergeError as error:  # the file is not a checkpoint any more
                    if isinstance(error.__cause__, OSError):
                        raise
                    is_same = False
                yield label, "same" if is_same else "changed"


def _repeat_merge(
    report: Mapping[str, Any], folder: Place, repeat: Repeat, pool: Threads, progress: bool
) -> tuple[int, list[str]]:
    """Return the number of repeated tensors, and the names of those with other bytes."""
    content = dict(report["recipe"])
    recipe = make_recipe(content, where=f"The recipe in {folder / REPORT}")
    plan = make_plan(recipe, folder, writes=False)
    with tempfile.TemporaryDirectory(prefix="starmerge-verify-") as scratch, pool as executor:
        merging = MergeRun(plan, executor, progress)
        if plan.output.is_assembled:
            writing = plan.output.lay_out(plan, LocalFolder(Path(scratch)))
            merging.write(writing)
            again = writing.finish(merging.records, merging.digests).digests
        else:
            numbers = _sample(plan) if repeat == "sample" else range(len(plan.tensors))
            writing = plan.output.lay_out(plan, _NullFolder())
            merging.write(writing, numbers=numbers)
            tensors = [plan.tensors[number] for number in numbers]
            again = digests_by_file(writing, tensors, merging.digests)
    known = _by_tensor(report["digests"])
    found = _by_tensor({file: {t.name: own for t, own in again[file]} for file in again})
    is_sample = repeat == "sample" and not plan.output.is_assembled
    compared = found.keys() if is_sample else {*found, *known}
    return len(found), sorted(key[1] for key in compared if found.get(key) != known.get(key))


class _NullFolder:
    """An output folder that discards all data, for merges of which only the hashes are needed."""

    is_complete = False

    def shared(self) -> _NullFolder:
        """Return this folder."""
        return self

    def open(self, name: str, size: int) -> _NullFile:
        """Return a file that discards all data."""
        return _NullFile()

    def put(self, name: str, content: bytes) -> None:
        """Do nothing."""

    append = put

    def mark(self, text: str) -> Place:
        """Raise: other machines cannot see this folder."""
        raise RuntimeError("Nothing is kept.")

    def delete(self, name: str) -> None:
        """Do nothing."""

    def names(self) -> list[str]:
        """Return an empty list."""
        return []

    def place(self, name: str) -> Place:
        """Raise: the folder has no files."""
        raise RuntimeError(f"{name} was not kept.")


class _NullFile:
    def write(self, content: memoryview, offset: int, *, more: bool = False) -> None:
        """Do nothing."""

    def copy(self, source: Path, start: int, length: int, offset: int) -> None:
        """Do nothing."""

    def read(self, offset: int, length: int) -> memoryview:
        """Raise: the data was discarded."""
        raise RuntimeError("What was written was not kept.")

    def sync(self) -> None:
        """Do nothing."""

    close = sync


def _by_tensor(digests: Mapping[str, Mapping[str, str]]) -> dict[tuple[str, str], str]:
    """Return digests by folder and tensor, because the shard of a tensor depends on the others."""
    return {
        (str(Path(file).parent), tensor): digest
        for file, own in digests.items()
        for tensor, digest in own.items()
    }


def _sample(plan: Plan) -> list[int]:
    """Return the numbers of randomly drawn tensors, some merged and some copied."""
    draw = random.SystemRandom()
    sample: list[int] = []
    for is_merged in (True, False):
        kind = [n for n, tensor in enumerate(plan.tensors) if bool(tensor.models) == is_merged]
        sample += draw.sample(kind, min(_SAMPLE, len(kind)))
    return sorted(sample)
