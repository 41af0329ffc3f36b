"""Calibration from one end to the other: a base reads, and its moments are written to a file."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from blake3 import blake3

from starmerge.calibration.modules import linears_of, some
from starmerge.calibration.moments import Group, Sum, collect, find_groups
from starmerge.calibration.text import Advance, Reading, Writer, texts_of
from starmerge.checkpoints.base import Base, open_base
from starmerge.checkpoints.hashing import remembered_blake3_of
from starmerge.checkpoints.metric import MetricWriter, is_metric
from starmerge.checkpoints.source import resolve
from starmerge.checkpoints.writer import check_output_file, check_space, output_file
from starmerge.errors import StarmergeError, UsageError, nearest
from starmerge.evaluation.models import Dtype, load_text_model
from starmerge.evaluation.task import Task
from starmerge.evaluation.tasks import find_task, task_of_prompts
from starmerge.merging.workers import Workers
from starmerge.progress import bytes_in_words, progress_bar

SEQUENCES = 128
"""Sequences that a base writes by itself, if nothing else is asked for."""

LENGTH = 80
"""Tokens that it writes to each."""

ROWS = 16
"""Prompts of a task."""

_PACKAGES = ("starmerge", "torch", "transformers", "tokenizers")
"""What decides the moments, by the names of the distributions."""

_ROWS_OF = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Calibrated:
    """What a calibration gave."""

    path: Path
    """The metric file."""
    nbytes: int
    entries: int
    """Roots in the file."""
    tensors: int
    """Tensors of the base that have a moment of the text for all tasks."""
    tasks: tuple[str, ...]
    """Tasks that have moments of their own."""
    tokens: int
    """Tokens of the text for all tasks; those of an encoder and a decoder count alike."""
    seconds: float
    """From the first token written or read to the complete file."""
    notes: tuple[str, ...]
    """What has no moment, and why."""

    def summary(self) -> str:
        """Return the result in a sentence."""
        tasks = f", and of the tasks {', '.join(self.tasks)}" if self.tasks else ""
        return (
            f"{self.entries} moments of {self.tensors} tensors, from {self.tokens} tokens{tasks}; "
            f"{bytes_in_words(self.nbytes)}, {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class _Source:
    """Text that moments are taken of."""

    task: str | None
    """Whose text; None: the text for all tasks."""
    written: int
    """Sequences that are written, and answers, for a progress bar."""
    tokens: int
    """Tokens of the encoder or of the decoder, at most: whichever reads more."""
    readings: Callable[[Advance], list[Reading]]
    """Returns what is read, having written what is missing."""
    record: Mapping[str, Any]
    """What the file says of it."""
    words: str
    """What people are told of it."""


@dataclass(frozen=True)
class _Plan:
    """A calibration, checked and ready to run."""

    output: Path
    overwrite: bool
    base: Base
    model: Any
    sources: tuple[_Source, ...]
    groups: tuple[Group, ...]
    calls: int
    """How many inputs a module gets for a token, at most."""
    memory: int
    """Bound of the sums, bytes."""
    record: Mapping[str, Any]
    """What the file says of how it was made."""
    notes: tuple[str, ...]
    """What has no moment, and why."""

    @property
    def nbytes(self) -> int:
        """Bytes of the roots, at most."""
        return sum(
            group.root_bytes(source.tokens * self.calls)
            for source in self.sources
            for group in self.groups
        )

    def passes(self, source: _Source, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Yield neighbours among groups whose sums fit into the memory, one at least."""
        part: list[Group] = []
        used = 0
        for group in groups:
            cost = group.sum_bytes(source.tokens * self.calls)
            if part and used + cost > self.memory:
                yield part
                part, used = [], 0
            part.append(group)
            used += cost
        if part:
            yield part

    def describe(self) -> str:
        """Say what will be read and how much will be written, in a few lines."""
        passes = [(source, list(self.passes(source, self.groups))) for source in self.sources]
        peak = max(
            sum(group.sum_bytes(source.tokens * self.calls) for group in part)
            for source, parts in passes
            for part in parts
        )
        memory = bytes_in_words(peak)
        count = sum(len(group.members) for group in self.groups)
        most = max(len(parts) for _, parts in passes)
        return "\n".join(
            [
                *(source.words for source in self.sources),
                f"Modules: {count}, with {len(self.groups)} inputs",
                f"Sums: {memory} of memory beside the model; passes over the text: {most}",
                f"File: {bytes_in_words(self.nbytes)} at most",
            ]
        )


def calibrate(
    base: str | Path,
    output: str | Path,
    *,
    texts: str | Path | None = None,
    prompts: Mapping[str, str | Path | Task] | None = None,
    sequences: int | None = None,
    length: int | None = None,
    rows: int = ROWS,
    seed: int = 0,
    memory: int | str | None = None,
    device: str | None = None,
    dtype: Dtype = "auto",
    overwrite: bool = False,
    announce: Callable[[str], object] | None = None,
    progress: bool = False,
) -> Calibrated:
    """Write the second moments Σ = E[x xᵀ] of what a base's linear modules read to a metric file.

    The mean goes over tokens and is not centred. The text for all tasks is that of a file, or the
    base writes it; of the prompts of tasks, moments are kept for each task beside. The file appears
    when it is complete.

    Args:
        base: A folder or Hub id; a causal or encoder-decoder language model, or an encoder of text.
        output: The file to write, such as metric.safetensors.
        texts: File of texts to read: .txt, a line a text, or .jsonl with ``text``; None: the base
            writes some.
        prompts: Tasks whose prompts are read, by the name that their moments get: a task, the name
            of one in the registry, a task file (.yaml), a folder with train.jsonl and test.jsonl,
            or rows (.jsonl, .csv, .parquet), which need no label.
        sequences: How many the base writes, by default 128; how many of the file's texts are read,
            by default all.
        length: Tokens that the base writes to a sequence (a decoder to a text or prompt), by
            default 80; tokens that are read of each of the file's texts, by default as many as the
            base takes.
        rows: Prompts of each task, at most; of the rows to train on where a task tells them from
            those to score.
        seed: Of what the base writes.
        memory: Bytes for the sums, or a text such as "4GB"; where all sums take more, the base
            reads the text several times. By default a quarter of the machine's memory, or half of
            what is free on a GPU.
        device: Where the base goes; None: the GPU if there is one.
        dtype: Of its weights; "auto": as they are stored, where the device computes in it.
        overwrite: Replace a metric file.
        announce: Called, before the base writes or reads, with a few lines that say what it will
            read and how large the file will be.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: The request is wrong: a file that is missing or of another kind, a base that
            cannot write and is given no texts, a model of images, an output that is there.
        StarmergeError: An input or a logit of the base is not finite, or the disk is full.
    """
    output = Path(output)
    _check_output(output, overwrite=overwrite)
    numbers = {"sequences": sequences, "length": length, "rows": rows}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}. Give a whole number, 1 or more.")
    if dtype not in get_args(Dtype):
        raise UsageError(f"The dtype {dtype!r} is unknown.{nearest(dtype, get_args(Dtype))}")
    bound = None if memory is None else Workers(memory=memory).memory
    given = None if texts is None else texts_of(Path(texts))[:sequences]
    tasks = _tasks_of(prompts or {})
    opened = open_base(resolve(base))
    model, tokenizer = load_text_model(opened.source.path, device=device, dtype=dtype)
    writer = Writer(model, tokenizer, seed=seed, length=length or LENGTH)
    if given is None:
        common = _own(writer, sequences or SEQUENCES, length or LENGTH, seed)
    else:
        assert texts is not None
        common = _of_file(writer, Path(texts), given, length, seed)
    sources = (common, *(_of_task(writer, name, task, rows, seed) for name, task in tasks.items()))
    linears, notes = linears_of(model, opened)
    if not linears:
        raise UsageError(f"{base} has no linear modules, so there are no moments to take.")
    try:
        groups, calls = find_groups(model, linears, writer.probe())
    except StarmergeError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise UsageError(
            f"{base}, a {type(model).__name__}, cannot read a text by itself: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    record = {
        **common.record,
        "prompts": {source.task: source.record for source in sources[1:]},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    plan = _Plan(
        output=output,
        overwrite=overwrite,
        base=opened,
        model=model,
        sources=sources,
        groups=tuple(groups),
        calls=calls,
        memory=bound or _free_memory(model.device),
        record=record,
        notes=tuple(notes),
    )
    check_space(output, plan.nbytes, advice="fewer --sequences or --rows")
    if announce is not None:
        announce(plan.describe())
    return _run(plan, progress=progress)


def _run(plan: _Plan, *, progress: bool) -> Calibrated:
    """Have the base write and read, and write the file."""
    started = time.monotonic()
    hashes = {file.name: remembered_blake3_of(file) for file in plan.base.checkpoint.files}
    name = plan.base.source.name or plan.base.source.path.resolve().name
    notes = list(plan.notes)
    entries = tokens = 0
    with (
        output_file(plan.output, overwrite=plan.overwrite) as partial_file,
        MetricWriter(
            partial_file,
            base=(name, hashes),
            made_from=plan.record,
            tensors=[tensor for group in plan.groups for tensor in group.tensors],
            tasks=[source.task for source in plan.sources if source.task is not None],
        ) as file,
    ):
        reached: dict[str | None, set[str]] = {}
        for source in plan.sources:
            what = f"writing for {source.task}" if source.task else "writing"
            with progress_bar(what, source.written, show=progress) as advance:
                readings = source.readings(advance)
            if source.task is None:
                tokens = sum(len(each.ids) + len(each.decoder) for each in readings)
            tensors = reached.setdefault(source.task, set())
            for group, moment in _moments(plan, source, readings, progress=progress):
                count = moment.tokens
                file.add(
                    moment.root(), group.tensors, side=group.side, task=source.task, tokens=count
                )
                tensors.update(group.tensors)
                entries += 1
            missing = [
                tensor for group in plan.groups for tensor in group.tensors if tensor not in tensors
            ]
            if missing:
                text = f"the prompts of {source.task}" if source.task else "the text"
                notes.append(f"{some(missing)}: never reached by {text}")
    return Calibrated(
        path=plan.output,
        nbytes=plan.output.stat().st_size,
        entries=entries,
        tensors=len(reached[None]),
        tasks=tuple(source.task for source in plan.sources if source.task is not None),
        tokens=tokens,
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )


def _moments(
    plan: _Plan, source: _Source, readings: Sequence[Reading], *, progress: bool
) -> Iterator[tuple[Group, Sum]]:
    """Yield the sums of all groups that a text reaches, pass by pass."""
    tokens = sum(len(each.ids) + len(each.decoder) for each in readings)
    groups = list(plan.groups)
    while groups:
        parts = list(plan.passes(source, groups))
        what = f"reading for {source.task}" if source.task else "reading"
        groups = []
        with progress_bar(what, tokens * len(parts), show=progress) as advance:
            for part in parts:
                done, again = collect(plan.model, part, readings, advance)
                groups += again
                yield from done


def _own(writer: Writer, sequences: int, length: int, seed: int) -> _Source:
    """Return the text that the base writes by itself."""
    beginning = len(writer.beginning())
    if writer.kind == "encoder-decoder":
        each, words = length, f"of {length} tokens at most, and what it answers to each"
    else:
        each = beginning + length
        words = f"of {length} tokens"
        words += f" after {beginning}" if writer.kind == "causal" else " in place of masks"
    return _Source(
        task=None,
        written=2 * sequences if writer.kind == "encoder-decoder" else sequences,
        tokens=sequences * each,
        readings=partial(writer.own, sequences),
        record={"kind": "self-written", "sequences": sequences, "length": length, "seed": seed},
        words=f"Text: {sequences} sequences that the base writes, {words}",
    )


def _of_file(
    writer: Writer, file: Path, texts: Sequence[str], length: int | None, seed: int
) -> _Source:
    """Return the text of a file."""
    readings = writer.texts(texts, length)
    tokens = _tokens(writer, readings)
    return _Source(
        task=None,
        written=len(readings),
        tokens=tokens,
        readings=partial(writer.answered, readings),
        record={
            "kind": "texts",
            "file": file.name,
            "blake3": remembered_blake3_of(file),
            "sequences": len(readings),
            "length": length,
            "seed": seed,
        },
        words=f"Text: {len(readings)} texts of {file}, {tokens} tokens",
    )


def _of_task(writer: Writer, name: str, task: Task, rows: int, seed: int) -> _Source:
    """Return the prompts of a task."""
    try:
        chosen = task.questions("train", rows)
    except UsageError as error:
        raise UsageError(
            f"{error} Or give prompts from a file: --prompts {name}=rows.jsonl."
        ) from error
    readings = writer.prompts(task, chosen)
    ids = json.dumps([reading.ids for reading in readings])
    tokens = _tokens(writer, readings)
    return _Source(
        task=name,
        written=len(readings),
        tokens=tokens,
        readings=partial(writer.answered, readings),
        record={
            "source": task.where,
            "rows": len(readings),
            "blake3": blake3(ids.encode()).hexdigest(),
            "seed": seed,
        },
        words=f"Task {name}: {len(readings)} prompts, {tokens} tokens",
    )


def _tokens(writer: Writer, readings: Sequence[Reading]) -> int:
    """Return how many tokens encoder or decoder read, at most: whichever reads more."""
    written = writer.length * len(readings) if writer.kind == "encoder-decoder" else 0
    return max(written, sum(len(reading.ids) for reading in readings))


def _tasks_of(prompts: Mapping[str, str | Path | Task]) -> dict[str, Task]:
    """Find the tasks that are meant, by the names of their moments: those of the tasks alone.

    Raises:
        UsageError: There is none of a name, it is one of images, or two have one name.
    """
    tasks: dict[str, Task] = {}
    for name, what in prompts.items():
        short = name.rpartition("/")[2]
        if not short or short in tasks:
            fault = "are given twice" if short else "have no name"
            raise UsageError(f"Prompts {name}={what}: the moments {fault}. Choose another name.")
        found = what
        if not isinstance(found, Task) and Path(found).suffix.lower() in _ROWS_OF:
            found = task_of_prompts(name, Path(found))
        elif not isinstance(found, Task):
            found = find_task(str(found))  # type: ignore[assignment]
        if not isinstance(found, Task):
            raise UsageError(f"{what} is a task of images, which has no prompts.")
        tasks[short] = found
    return tasks


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Make sure that the file may be written: what is replaced must be a metric.

    Raises:
        UsageError: It may not.
    """
    check_output_file(output, overwrite=overwrite)
    if output.exists() and not is_metric(output):
        raise UsageError(
            f"{output} is no metric file and is not overwritten. Choose another name, or delete it "
            "yourself."
        )


def _free_memory(device: torch.device) -> int:
    """Return the bytes that sums may take if nothing else is asked for."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return Workers().memory
