"""The merge itself: a walk over the base's tensors, some at a time, from files to files."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from starmerge.checkpoints.card import CARD, write_card
from starmerge.checkpoints.leftovers import leftovers
from starmerge.checkpoints.output import REPORT, files_in, output_folder, printable
from starmerge.checkpoints.tensors import prefetch
from starmerge.checkpoints.writer import write_json
from starmerge.deltas import Delta
from starmerge.merging.checks import check_delta, check_weights
from starmerge.merging.journal import Journal, fingerprint
from starmerge.merging.layout import PlannedTensor
from starmerge.merging.outputs import Writing
from starmerge.merging.plan import Plan, make_plan
from starmerge.merging.report import (
    InputHashes,
    MergeReport,
    hashes_beside,
    make_report,
    tensor_record,
)
from starmerge.merging.workers import Workers
from starmerge.methods.method import Deltas, Method, TensorContext
from starmerge.methods.pipeline import Pipeline, as_pipeline
from starmerge.progress import progress_bar
from starmerge.recipe import Dtype, OutputKind, make_recipe, model_entries, reference

_Seen = TypeVar("_Seen")


@dataclass(frozen=True)
class MergeResult:
    """A finished merge."""

    path: Path
    """The folder of the merged model."""
    report: MergeReport
    taken_up: int = 0
    """Tensors that an earlier run, which was killed, had written."""


def merge(
    base: str | Path | None,
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    method: Method | Pipeline | str = "star",
    *,
    output: str | Path,
    weights: Sequence[float] | None = None,
    metric: str | Path | None = None,
    dtype: Dtype = "keep",
    output_kind: OutputKind | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    any_base: bool = False,
    overwrite: bool = False,
    fresh: bool = False,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> MergeResult:
    """Merge fine-tunes of one base into a model that ``transformers`` loads, or into an adapter.

    The folder appears when it is complete. Its bytes do not depend on ``threads`` and ``memory``.

    Args:
        base: The base model: a folder, or a Hub id ``org/name`` or ``org/name@revision``. None:
            adapters alone are merged into an adapter.
        models: LoRA adapters in PEFT's layout and full fine-tunes, as folders or Hub ids; a mapping
            gives them names.
        method: A method such as ``Star(eta=40)``, a chain of some, or a name such as "star+ties".
        output: The folder to create.
        weights: Factors of the task vectors, one for each model; by default all are 1.
        metric: A file of :func:`starmerge.calibrate` for this base: spectral methods then merge in
            whitened inputs.
        dtype: Dtype of the floating-point tensors; "keep" keeps each as it is.
        output_kind: "model", or "adapter" for a LoRA adapter in PEFT's layout; by default a model,
            or of ``emr`` its unified vector with masks.
        rank: The highest rank of an adapter; by default as high as its updates need.
        max_error: Refuse an adapter whose update is farther from the merge's, in the Frobenius norm
            relative to it.
        any_base: Accept adapters whose config names another base.
        overwrite: Replace what stands at ``output``.
        fresh: Begin anew. By default the merge goes on where one of the same inputs, recipe and
            output was killed, with the tensors that it had written; the bytes are the same.
        threads: How many tensors are merged at once, each by one thread; by default as many as
            there are processors, or as OMP_NUM_THREADS says.
        memory: Bytes that the tensors that are merged at once may take, or a text such as "4GB";
            by default a quarter of the machine's memory. A tensor that needs more is merged alone.
        progress: Show a progress bar on standard error.

    Raises:
        UsageError: Something was asked for wrongly; nothing was read or written.
        StarmergeError: An input is broken or does not fit; nothing is left at ``output``.

    Example:
        ``starmerge.merge("base", ["a", "b"], starmerge.Star(eta=40), output="merged")``
    """
    entries = model_entries(models)
    pipeline = as_pipeline(method)
    factors = check_weights(weights, len(entries))
    recipe = make_recipe(
        {
            "base": None if base is None else reference(base),
            "models": [
                {**entry, "weight": weight} for entry, weight in zip(entries, factors, strict=True)
            ],
            "method": pipeline.name,
            "parameters": pipeline.parameters(),
            "metric": None if metric is None else str(metric),
            "dtype": dtype,
            "output": {"kind": output_kind, "rank": rank, "max_error": max_error},
            "any_base": any_base,
        }
    )
    plan = make_plan(recipe, Path(output), overwrite=overwrite)
    return run(plan, fresh=fresh, threads=threads, memory=memory, progress=progress)


def run(
    plan: Plan,
    *,
    fresh: bool = False,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> MergeResult:
    """Carry out a plan; see :func:`merge`.

    Raises:
        UsageError: ``threads`` or ``memory`` is not a positive number.
        StarmergeError: A NaN or an infinity, in an input or by overflow of the output's dtype; a
            file that is shorter than it was. Nothing is left at the plan's output.
    """
    pool = Workers(threads, memory)
    own = fingerprint(plan)
    if fresh:
        for leftover in leftovers(plan.path):
            if leftover.role == "partial" and leftover.path.name.endswith(own):
                leftover.delete()
    with (
        output_folder(plan.path, overwrite=plan.overwrite, suffix=own) as folder,
        pool as workers,
        InputHashes(plan) as hashes,
    ):
        merging = Merging(plan, workers, progress)
        with plan.output.open(plan, folder) as writing, Journal(folder, writing) as journal:
            records = merging.write(writing, journal)
        finished = writing.finish(records)
        plan.check_unchanged()
        report = make_report(
            plan, finished, merging.findings, records, hashes.result(), merging.inputs.changing
        )
        write_card(
            folder / CARD,
            printable(plan.path.name),
            plan.base,
            plan.models,
            plan.recipe.to_yaml(),
            f"{report.summary()} {plan.output.usage(plan, printable(plan.path.name))}".rstrip(),
            library=plan.output.library,
            metric=None if plan.metric is None else plan.metric.file.name,
        )
        journal.end()
        report.content["files"] = sorted({*files_in(folder), REPORT})
        report.content["blake3"] = hashes_beside(folder, report.content)
        write_json(folder / REPORT, report.content)
    return MergeResult(plan.path, report, journal.taken_up)


class Merging:
    """A plan being carried out by some workers."""

    def __init__(self, plan: Plan, workers: Workers, progress: bool) -> None:
        self._plan, self._workers, self._progress = plan, workers, progress
        self.inputs = _Inputs()
        self.findings: dict[str, Any] = {}
        """What the methods found in the whole model."""

    def write(
        self,
        writing: Writing,
        journal: Journal | None = None,
        *,
        tensors: Sequence[PlannedTensor] | None = None,
    ) -> list[dict[str, Any]]:
        """Merge tensors and write them; return the records of those that are merged.

        Args:
            writing: The output.
            journal: Knows what an earlier run has written, and is told what is.
            tensors: Some of the plan's; by default all. Methods see the whole model in any case.
        """
        plan, records = self._plan, []
        prepared = plan.pipeline.prepare(
            partial(_walk, plan, self._workers, self.inputs, self._progress)
        )
        self.findings = prepared.findings

        def write(tensor: PlannedTensor) -> dict[str, Any] | None:
            entry = None if journal is None else journal.finished(tensor)
            if entry is not None:
                self.inputs.changing.update(entry.changing)
                taken_up.add(tensor.source.name)
                return entry.record
            if not tensor.models:
                writing.leave(tensor)
                return None
            base = _base_of(plan, tensor)
            merged = prepared.merge(
                self.inputs.of(tensor, base),
                plan.context(tensor, base),
                holds_inputs=plan.output.reads_inputs,
            )
            return tensor_record(plan, tensor, writing.put(tensor, base, merged), merged)

        taken_up: set[str] = set()
        wanted = plan.tensors if tensors is None else tensors
        size = sum(map(plan.output.nbytes, wanted))
        with (
            progress_bar("merging", size, show=self._progress, in_bytes=True) as advance,
            closing(_in_order(plan, self._workers, write, wanted)) as written,
        ):
            for tensor, record in zip(wanted, written, strict=True):
                if record is not None:
                    records.append(record)
                if journal is not None and tensor.source.name not in taken_up:
                    journal.add(tensor, record, self.inputs.changing)
                advance(plan.output.nbytes(tensor))
        if journal is not None:
            journal.taken_up = len(taken_up)
        return records


def _base_of(plan: Plan, tensor: PlannedTensor) -> Tensor | None:
    return plan.base.checkpoint.read(tensor.source.name) if tensor.reads_base else None


def _walk(
    plan: Plan,
    workers: Workers,
    inputs: _Inputs,
    progress: bool,
    look: Callable[[Deltas, TensorContext], _Seen],
) -> Iterator[_Seen]:
    """Yield what ``look`` returns for each tensor that some model changes."""

    def see(tensor: PlannedTensor) -> _Seen:
        base = _base_of(plan, tensor)
        return look(inputs.of(tensor, base), plan.context(tensor, base))

    size = sum(tensor.bytes_to_read for tensor in plan.merged)
    with (
        progress_bar("surveying", size, show=progress, in_bytes=True) as advance,
        closing(_in_order(plan, workers, see, plan.merged)) as seen,
    ):
        for tensor, result in zip(plan.merged, seen, strict=True):
            yield result
            advance(tensor.bytes_to_read)


def _in_order(
    plan: Plan,
    workers: Workers,
    work: Callable[[PlannedTensor], _Seen],
    tensors: Sequence[PlannedTensor],
) -> Generator[_Seen]:
    """Work on some tensors at once, and read ahead those that come next; yield in their order."""

    def announce(tensor: PlannedTensor) -> None:
        for info in tensor.inputs:
            prefetch(info)

    return workers.in_order(
        work,
        tensors,
        memory=plan.memory_of,
        announce=announce,
        nbytes=lambda tensor: tensor.bytes_to_read,
    )


class _Inputs:
    """The task vectors of the models, which are checked when they are read for the first time."""

    def __init__(self) -> None:
        self.changing: set[int] = set()
        """Numbers of the models of which some delta that was read is not zero."""
        self._checked: set[tuple[int, str]] = set()

    def of(self, tensor: PlannedTensor, base: Tensor | None) -> Deltas:
        """Return the task vectors of a tensor, given the base's."""
        loaders = {t: partial(self._load, tensor, base, t) for t in tensor.models}
        return Deltas(loaders)

    def _load(self, tensor: PlannedTensor, base: Tensor | None, t: int) -> Delta:
        model, name = tensor.models[t], tensor.source.name
        delta = model.delta(name, base)
        if (t, name) not in self._checked:
            check_delta(delta, model, tensor.source, base)
            if t not in self.changing and not delta.is_zero():
                self.changing.add(t)
            self._checked.add((t, name))
        return delta
