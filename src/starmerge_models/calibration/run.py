"""Runs a calibration: a base processes text, and its moments are written to a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from starmerge_models.calibration.interleaved import InterleavedMerge, Stage
from starmerge_models.calibration.modules import linears_of, shorten
from starmerge_models.calibration.moments import Group, Sum, collect, find_groups
from starmerge_models.calibration.sources import (
    Source,
    generated_text,
    prompts_of_task,
    tasks_of,
    text_of_file,
)
from starmerge_models.calibration.text import Advance, Reading, TextGenerator, texts_of
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
"""Default number of sequences that a base generates."""

LENGTH = 80
"""Default number of tokens that a base generates for each sequence."""

ROWS = 16
"""Default number of prompts of a task."""

_PACKAGES = ("torch", "transformers", "tokenizers")
"""Distributions whose versions the file records."""


@dataclass(frozen=True)
class Calibrated:
    """The result of a calibration."""

    path: Path
    """The metric file."""
    nbytes: int
    entries: int
    """Number of roots in the file."""
    tensors: int
    """Number of the base's tensors with a moment of the text for all tasks."""
    tasks: tuple[str, ...]
    """Tasks with their own moments."""
    tokens: int
    """Number of tokens of the text for all tasks, of encoder and decoder together."""
    seconds: float
    """Time from the first generated or processed token to the complete file."""
    notes: tuple[str, ...]
    """Tensors without a moment, with the reason."""

    def summary(self) -> str:
        """Summarise the result in a sentence."""
        tasks = f", and of the tasks {', '.join(self.tasks)}" if self.tasks else ""
        return (
            f"{self.entries} moments of {self.tensors} tensors, from {self.tokens} tokens{tasks}; "
            f"{bytes_in_words(self.nbytes)}, {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class _Plan:
    """A validated calibration."""

    output: Path
    overwrite: bool
    base: Base
    model: Any
    sources: tuple[Source, ...]
    groups: tuple[Group, ...]
    calls: int
    """Largest number of inputs of a module for each token."""
    memory: int
    """Memory limit of the sums, in bytes."""
    interleaved: InterleavedMerge | None
    """The merge during which prompts are read; None: the base alone reads them."""
    record: Mapping[str, Any]
    """Provenance for the file's metadata."""
    notes: tuple[str, ...]
    """Tensors without a moment, with the reason."""

    @property
    def nbytes(self) -> int:
        """Largest total size of the roots, in bytes."""
        return sum(
            group.root_bytes(source.tokens * self.calls)
            for source in self.sources
            for group in self.groups_of(source)
        )

    def groups_of(self, source: Source) -> Sequence[Group]:
        """Return the groups that have moments of a text."""
        return (
            self.groups
            if source.task is None or self.interleaved is None
            else self.interleaved.groups
        )

    def passes(self, source: Source, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Yield consecutive groups whose sums fit into memory, at least one group."""
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
        """Describe the text and the size of the file, in a few lines."""
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
        layers = [] if self.interleaved is None else [self.interleaved.describe()]
        return "\n".join(
            [
                *(source.words for source in self.sources),
                *layers,
                f"Modules: {count}, with {len(self.groups)} inputs",
                f"Sums: {memory} of memory in addition to the model; passes over the text: {most}",
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
    """Write the second moments Σ = E[x xᵀ] of a base's linear modules' inputs to a metric file.

    The mean is over tokens and not centred. The text for all tasks comes from a file, or the base
    generates it; the prompts of tasks give additional moments for each task. The file is written
    atomically.

    With models, the prompts are read layer by layer during the merge, not by the unmerged base
    (RegMean++, arXiv 2508.03121): :mod:`starmerge_models.calibration.interleaved`. ``regmean`` with
    this file keeps more of each task, but the file is only for the merge of exactly these models.

    Args:
        base: A folder or Hub id of a causal or encoder-decoder language model, or a text encoder.
        output: The file to write, such as metric.safetensors.
        models: The adapters and full fine-tunes that will be merged, with the names of their tasks;
            empty: the base reads the prompts.
        texts: File of texts: .txt, one text per line, or .jsonl with ``text``; None: the base
            generates text.
        prompts: Tasks with prompts, by the name of their moments: a task, the name of one in the
            registry, a task file (.yaml), a folder with train.jsonl and test.jsonl, or rows
            (.jsonl, .csv, .parquet), which need no label.
        sequences: How many sequences the base generates, by default 128; or how many of the file's
            texts to read, by default all.
        length: Tokens that the base generates for each sequence (a decoder for each text or
            prompt), by default 80; or tokens to read of each of the file's texts, by default as
            many as the base's context has.
        rows: Most prompts of each task, from the training rows if the task has these.
        seed: Seed of the generated text.
        any_base: Accept adapters whose config names another base.
        memory: Memory limit of the sums in bytes, or as a text such as "4GB"; if all sums need
            more, the base reads the text several times. By default a quarter of the machine's
            memory, or half of a GPU's free memory.
        device: Device to load the base on; None: the GPU if there is one.
        dtype: Dtype of its weights; "auto": the stored dtype if the device computes in it natively.
        overwrite: Whether to replace an existing metric file.
        announce: Called before the calibration with a few lines that describe the text and the
            size of the file.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: A file is missing or of another kind, the base cannot generate text and there
            are no texts, the model is one of images, the output exists, or the models have other
            names than the prompts or cannot be merged.
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
            f"{opened.source} is quantised ({opened.quantised}), and calibration needs plain "
            "linear layers. Give the unquantised model."
        )
    vectors = load_task_vectors(base, models, any_base=any_base) if names else None
    model, tokenizer = load_text_model(source.path, device=device, dtype=dtype)
    writer = TextGenerator(model, tokenizer, seed=seed, length=length or LENGTH)
    if given is None:
        common = generated_text(writer, sequences or SEQUENCES, length or LENGTH, seed)
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
    along = InterleavedMerge(model, vectors, groups, is_read_once=calls == 1) if vectors else None
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
        interleaved=along,
        record=record,
        notes=tuple(notes),
    )
    check_space(output, plan.nbytes, advice="fewer --sequences or --rows")
    if announce is not None:
        announce(plan.describe())
    return _run(plan, progress=progress)


def _run(plan: _Plan, *, progress: bool) -> Calibrated:
    """Generate and process the text, and write the file."""
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
                notes.append(f"{shorten(missing)}: never reached by {text}")
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
        if source.task is None or plan.interleaved is None:
            what = f"reading for {source.task}" if source.task else "reading"
            passes = list(plan.passes(source, plan.groups))
            total = _length(texts[source.task]) * len(passes)
            with progress_bar(what, total, show=progress) as advance:
                for group, found in _sums(plan, source, plan.groups, texts[source.task], advance):
                    yield source.task, group, Moment(found.root(), found.tokens)
    if plan.interleaved is None:
        return
    sources = {source.task: source for source in plan.sources if source.task is not None}
    total = len(plan.interleaved.stages) * sum(_length(texts[task]) for task in sources)
    with progress_bar("reading layer by layer", total, show=progress) as advance:

        def read(stage: Stage, task: str) -> Iterator[tuple[Group, Sum]]:
            return _sums(plan, sources[task], stage.groups, texts[task], advance, stage.until)

        yield from plan.interleaved.moments(list(sources), read)


def _sums(
    plan: _Plan,
    source: Source,
    groups: Sequence[Group],
    readings: Sequence[Reading],
    advance: Advance,
    until: nn.Module | None = None,
) -> Iterator[tuple[Group, Sum]]:
    """Yield the sums of the groups that a text reaches, over one or more passes."""
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
    """Make sure that models, if there are any, have the same names as the prompts.

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
            f"The prompts are to be read during a merge of {', '.join(models)}, and {fault}. Give "
            "each model prompts of its name (NAME=PATH, --prompts NAME=ROWS), or leave the models "
            "out."
        )


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Make sure that the output does not exist, or is a metric file that may be replaced.

    Raises:
        UsageError: It exists and may not be replaced.
    """
    check_output_file(output, overwrite=overwrite)
    if output.exists() and not is_metric(output):
        raise UsageError(
            f"{output} is not a metric file and is not overwritten. Choose another name, or delete "
            "it yourself."
        )


def _free_memory(device: torch.device) -> int:
    """Return the default memory limit of the sums, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return Threads().memory
