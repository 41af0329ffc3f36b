"""Calibration from one end to the other: a base reads, and its moments are written to a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from starmerge_models.calibration.along import Along, Stage
from starmerge_models.calibration.modules import linears_of, some
from starmerge_models.calibration.moments import Group, Sum, collect, find_groups
from starmerge_models.calibration.sources import (
    Source,
    own_text,
    prompts_of_task,
    tasks_of,
    text_of_file,
)
from starmerge_models.calibration.text import Advance, Reading, Writer, texts_of
from starmerge_models.checkpoints.base import Base, open_base
from starmerge_models.checkpoints.hashing import cached_blake3_of
from starmerge_models.checkpoints.metric import MetricWriter, is_metric
from starmerge_models.checkpoints.source import resolve_local
from starmerge_models.errors import StarmergeError, UsageError, nearest
from starmerge_models.evaluation.models.loading import Dtype, load_text_model
from starmerge_models.evaluation.tasks.task import Task
from starmerge_models.events import bytes_in_words
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.metric import hashes_of
from starmerge_models.merging.task_vectors import load_task_vectors
from starmerge_models.progress import progress_bar
from starmerge_models.recipe import model_entries
from starmerge_models.spectral.moment import Moment
from starmerge_models.storage import real
from starmerge_models.storage.publishing import check_output_file, check_space, output_file
from starmerge_models.versions import installed_versions

SEQUENCES = 128
"""Sequences that a base writes by itself, if nothing else is asked for."""

LENGTH = 80
"""Tokens that it writes to each."""

ROWS = 16
"""Prompts of a task."""

_PACKAGES = ("torch", "transformers", "tokenizers")
"""What decides the moments, by the names of the distributions."""


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
class _Plan:
    """A calibration, checked and ready to run."""

    output: Path
    overwrite: bool
    base: Base
    model: Any
    sources: tuple[Source, ...]
    groups: tuple[Group, ...]
    calls: int
    """How many inputs a module gets for a token, at most."""
    memory: int
    """Bound of the sums, bytes."""
    along: Along | None
    """The merge that prompts are read along; None: the base reads them."""
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
            for group in self.groups_of(source)
        )

    def groups_of(self, source: Source) -> Sequence[Group]:
        """Return the groups that get moments of a text."""
        return self.groups if source.task is None or self.along is None else self.along.groups

    def passes(self, source: Source, groups: Sequence[Group]) -> Iterator[list[Group]]:
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
        passes = [
            (source, list(self.passes(source, self.groups_of(source)))) for source in self.sources
        ]
        peak = max(
            sum(group.sum_bytes(source.tokens * self.calls) for group in part)
            for source, parts in passes
            for part in parts
        )
        memory = bytes_in_words(peak)
        count = sum(len(group.members) for group in self.groups)
        most = max(len(parts) for _, parts in passes)
        layers = [] if self.along is None else [self.along.describe()]
        return "\n".join(
            [
                *(source.words for source in self.sources),
                *layers,
                f"Modules: {count}, with {len(self.groups)} inputs",
                f"Sums: {memory} of memory beside the model; passes over the text: {most}",
                f"File: {bytes_in_words(self.nbytes)} at most",
            ]
        )


def calibrate(
    base: str | Path,
    output: str | Path,
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path] = (),
    *,
    texts: str | Path | None = None,
    prompts: Mapping[str, str | Path | Task] | None = None,
    sequences: int | None = None,
    length: int | None = None,
    rows: int = ROWS,
    seed: int = 0,
    any_base: bool = False,
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

    With models, the prompts are not read by the base but by the model as far as it is merged, layer
    by layer (RegMean++, arXiv 2508.03121): :mod:`starmerge_models.calibration.along`. ``regmean``
    with such a file keeps more, and the file serves the merge of just these models.

    Args:
        base: A folder or Hub id; a causal or encoder-decoder language model, or an encoder of text.
        output: The file to write, such as metric.safetensors.
        models: The adapters and full fine-tunes that will be merged, named as their tasks are;
            none: the base reads the prompts.
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
        any_base: Accept adapters whose config names another base.
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
            cannot write and is given no texts, a model of images, an output that is there; models
            that are not named as the prompts are, or cannot be merged.
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
    bound = None if memory is None else Threads(memory=memory).memory
    given = None if texts is None else texts_of(Path(texts))[:sequences]
    tasks = tasks_of(prompts or {})
    names = [entry["name"] for entry in model_entries(models)]
    _check_names(names, list(tasks))
    source = resolve_local(base)
    opened = open_base(source)
    if opened.quantised:
        raise UsageError(
            f"{opened.source} is quantised ({opened.quantised}): its layers are not those whose "
            "inputs are measured. Give the unquantised model."
        )
    vectors = load_task_vectors(base, models, any_base=any_base) if names else None
    model, tokenizer = load_text_model(source.path, device=device, dtype=dtype)
    writer = Writer(model, tokenizer, seed=seed, length=length or LENGTH)
    if given is None:
        common = own_text(writer, sequences or SEQUENCES, length or LENGTH, seed)
    else:
        assert texts is not None
        common = text_of_file(writer, Path(texts), given, length, seed)
    own = [prompts_of_task(writer, name, task, rows, seed) for name, task in tasks.items()]
    sources = (common, *own)
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
    along = Along(model, vectors, groups, is_read_once=calls == 1) if vectors else None
    record = {
        **common.record,
        **({"along": hashes_of(vectors.models)} if vectors else {}),
        "prompts": {source.task: source.record for source in sources[1:]},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": installed_versions(_PACKAGES),
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
        along=along,
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
    hashes = {file.name: cached_blake3_of(file) for file in plan.base.checkpoint.files}
    name = plan.base.source.name or real(plan.base.source.path).name
    notes = list(plan.notes)
    entries = 0
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
        texts = {}
        for source in plan.sources:
            what = f"writing for {source.task}" if source.task else "writing"
            with progress_bar(what, source.written, show=progress) as advance:
                texts[source.task] = source.readings(advance)
        reached: dict[str | None, set[str]] = {source.task: set() for source in plan.sources}
        for task, group, moment in _moments(plan, texts, progress=progress):
            file.add(moment.root, group.tensors, side=group.side, task=task, tokens=moment.tokens)
            reached[task].update(group.tensors)
            entries += 1
        for source in plan.sources:
            groups = plan.groups_of(source)
            tensors = [tensor for group in groups for tensor in group.tensors]
            missing = [tensor for tensor in tensors if tensor not in reached[source.task]]
            if missing:
                text = f"the prompts of {source.task}" if source.task else "the text"
                notes.append(f"{some(missing)}: never reached by {text}")
    return Calibrated(
        path=plan.output,
        nbytes=plan.output.stat().st_size,
        entries=entries,
        tensors=len(reached[None]),
        tasks=tuple(source.task for source in plan.sources if source.task is not None),
        tokens=_length(texts[None]),
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )


def _moments(
    plan: _Plan, texts: Mapping[str | None, Sequence[Reading]], *, progress: bool
) -> Iterator[tuple[str | None, Group, Moment]]:
    """Yield the moments of all texts, each by its task."""
    for source in plan.sources:
        if source.task is None or plan.along is None:
            what = f"reading for {source.task}" if source.task else "reading"
            passes = list(plan.passes(source, plan.groups))
            total = _length(texts[source.task]) * len(passes)
            with progress_bar(what, total, show=progress) as advance:
                for group, found in _sums(plan, source, plan.groups, texts[source.task], advance):
                    yield source.task, group, Moment(found.root(), found.tokens)
    if plan.along is None:
        return
    sources = {source.task: source for source in plan.sources if source.task is not None}
    total = len(plan.along.stages) * sum(_length(texts[task]) for task in sources)
    with progress_bar("reading layer by layer", total, show=progress) as advance:

        def read(stage: Stage, task: str) -> Iterator[tuple[Group, Sum]]:
            return _sums(plan, sources[task], stage.groups, texts[task], advance, stage.until)

        yield from plan.along.moments(list(sources), read)


def _sums(
    plan: _Plan,
    source: Source,
    groups: Sequence[Group],
    readings: Sequence[Reading],
    advance: Advance,
    until: nn.Module | None = None,
) -> Iterator[tuple[Group, Sum]]:
    """Yield the sums of the groups that a text reaches, pass by pass."""
    left = list(groups)
    while left:
        parts = list(plan.passes(source, left))
        left = []
        for part in parts:
            done, again = collect(plan.model, part, readings, advance, until)
            left += again
            yield from done


def _length(readings: Sequence[Reading]) -> int:
    return sum(len(reading.ids) + len(reading.decoder) for reading in readings)


def _check_names(models: Sequence[str], tasks: Sequence[str]) -> None:
    """Make sure that models, if there are any, are those of the prompts.

    Raises:
        UsageError: A model has no prompts, or prompts no model.
    """
    alone = sorted(set(models) ^ set(tasks))
    if models and alone:
        name = alone[0]
        fault = (
            f"the model {name} has no prompts" if name in models else f"no model is called {name}"
        )
        raise UsageError(
            f"The prompts are to be read along a merge of {', '.join(models)}, and {fault}. Give "
            "each model prompts of its name (NAME=PATH, --prompts NAME=ROWS), or leave the models "
            "out."
        )


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
    return Threads().memory
