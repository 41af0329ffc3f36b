"""Whether a merge is what its report says: its files, what it was made of, and the merge itself."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ValidationError

from starmerge.checkpoints.hashing import blake3_of
from starmerge.checkpoints.output import REPORT
from starmerge.checkpoints.source import resolve
from starmerge.checkpoints.tensors import Checkpoint, open_safetensors, raw_bytes
from starmerge.errors import StarmergeError, UsageError
from starmerge.merging.engine import Merging
from starmerge.merging.plan import Plan, make_plan
from starmerge.merging.report import SCHEMA
from starmerge.merging.workers import Workers
from starmerge.progress import progress_bar
from starmerge.reading import read_json
from starmerge.recipe import make_recipe

Repeat = Literal["none", "sample", "all"]

_SAMPLE = 8
"""Merged tensors of a sample, and as many that are copied."""


class _Input(BaseModel):
    name: str
    reference: str
    blake3: dict[str, str]


class _Report(BaseModel):
    """The parts of a report that are looked at."""

    files: list[str]
    digests: dict[str, dict[str, str]]
    blake3: dict[str, str] = {}
    inputs: list[_Input]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What a merge was found to be."""

    path: str
    tensors: int
    """Tensors whose bytes have been compared with the report."""
    wrong: list[str] = field(default_factory=list)
    """Files and tensors of the merge that are not what the report says, each in a sentence."""
    inputs: dict[str, str] = field(default_factory=dict)
    """For each input file "same", "changed" or "missing"; empty if they were not looked at."""
    repeated: int = 0
    """Tensors that were merged again."""
    different: list[str] = field(default_factory=list)
    """Those of them that come out otherwise."""
    not_repeated: str | None = None
    """Why nothing was merged again, though it was asked for."""

    @property
    def is_right(self) -> bool:
        """Whether nothing speaks against the merge. Inputs that are gone do not."""
        changed = "changed" in self.inputs.values()
        return not (self.wrong or self.different or changed or self.not_repeated)

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        return {"is_right": self.is_right, **asdict(self)}


def verify(
    path: str | Path,
    *,
    inputs: bool = True,
    repeat: Repeat = "none",
    threads: int | None = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> Verdict:
    """Compare a merged folder with its report, byte by byte; its card may be edited.

    Args:
        path: The folder.
        inputs: Hash the input files too, where they are found under the names in the report.
        repeat: Merge again and compare: "sample" some tensors, drawn at random, "all" all of them.
            Methods that look at the whole model do so in both. Of an adapter "sample" means all.
        threads: As for :func:`starmerge.merge`.
        memory: As for :func:`starmerge.merge`.
        progress: Show a progress bar on standard error.

    Raises:
        UsageError: The folder has no report, or one of another version.
        StarmergeError: The report is broken.
    """
    folder = Path(path)
    file = folder / REPORT
    if not file.is_file():
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
    checked, wrong = _check_output(folder, report, progress)
    verdict = Verdict(str(folder), checked, wrong)
    if inputs:
        verdict = replace(verdict, inputs=dict(_check_inputs(report)))
    if repeat == "none":
        return verdict
    try:
        repeated, different = _merged_again(
            report, folder, repeat, Workers(threads, memory), progress
        )
    except StarmergeError as error:
        return replace(verdict, not_repeated=str(error))
    return replace(verdict, repeated=repeated, different=different)


def _check_output(folder: Path, report: Mapping[str, Any], progress: bool) -> tuple[int, list[str]]:
    """Return how many tensors were compared, and what is wrong."""
    wrong = [f"{name} is missing." for name in report["files"] if not (folder / name).is_file()]
    wrong += [
        f"{name}: the bytes are not those that were written."
        for name, digest in report.get("blake3", {}).items()
        if (folder / name).is_file() and blake3_of(folder / name) != digest
    ]
    checked = 0
    for name, digests in report["digests"].items():
        if not (folder / name).is_file():
            continue
        try:
            stored = open_safetensors(folder / name)
        except StarmergeError as error:
            wrong.append(str(error))
            continue
        wrong += [f"{name}: the tensor {t} is missing." for t in digests if t not in stored]
        wrong += [
            f"{name}: the tensor {t} is not in the report." for t in stored if t not in digests
        ]
        size = sum(stored[tensor].nbytes for tensor in stored)
        with progress_bar("verifying", size, show=progress, in_bytes=True) as advance:
            for tensor in stored:
                if tensor in digests and _digest(stored, tensor) != digests[tensor]:
                    wrong.append(f"{name}: the bytes of {tensor} are not those that were written.")
                checked += 1
                advance(stored[tensor].nbytes)
    return checked, wrong


def _check_inputs(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for source in report["inputs"]:
        try:
            path = Path(source["reference"])
            found = path if path.is_file() else resolve(source["reference"]).path
        except StarmergeError:
            found = None
        for name, digest in source["blake3"].items():
            label = f"{source['name']}: {name}"
            if found is None:
                yield label, "missing"
                continue
            file = found if found.is_file() else found / name
            if not file.is_file():
                yield label, "missing"
            else:
                yield label, "same" if blake3_of(file) == digest else "changed"


def _merged_again(
    report: Mapping[str, Any], folder: Path, repeat: Repeat, pool: Workers, progress: bool
) -> tuple[int, list[str]]:
    """Return how many tensors were merged again, and those that come out otherwise."""
    content = dict(report["recipe"])
    recipe = make_recipe(content, where=f"The recipe in {folder / REPORT}")
    with tempfile.TemporaryDirectory(prefix="starmerge-verify-") as scratch, pool as workers:
        plan = make_plan(recipe, Path(scratch) / "out")
        if repeat == "sample" and plan.output.kind != "adapter":
            drawn = set(_sample(plan))
            part = replace(plan, tensors=tuple(t for t in plan.tensors if t.source.name in drawn))
        else:
            part = plan
        place = Path(scratch) / "again"
        place.mkdir()
        with plan.output.open(part, place) as writing:
            records = Merging(plan, workers, progress).write(writing, tensors=part.tensors)
        again = writing.finish(records).digests
    known = _by_tensor(report["digests"])
    found = _by_tensor(again)
    return len(found), sorted(key[1] for key in found if found[key] != known.get(key))


def _by_tensor(digests: Mapping[str, Mapping[str, str]]) -> dict[tuple[str, str], str]:
    """Return digests by folder and tensor: in which shard a tensor lies hangs on the others."""
    return {
        (str(Path(file).parent), tensor): digest
        for file, own in digests.items()
        for tensor, digest in own.items()
    }


def _sample(plan: Plan) -> Iterator[str]:
    draw = random.SystemRandom()
    kinds: list[Callable[[Any], bool]] = [lambda t: bool(t.models), lambda t: not t.models]
    for kind in kinds:
        names = [tensor.source.name for tensor in plan.tensors if kind(tensor)]
        yield from draw.sample(names, min(_SAMPLE, len(names)))


def _digest(checkpoint: Checkpoint, tensor: str) -> str:
    return blake3(raw_bytes(checkpoint.read(tensor).contiguous()), max_threads=1).hexdigest()
