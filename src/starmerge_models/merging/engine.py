"""The merge itself: a walk over the base's tensors, some at a time, from files to files."""

from __future__ import annotations

import html
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starmerge_models import events
from starmerge_models.checkpoints.card import CARD, card_of
from starmerge_models.checkpoints.writer import json_bytes
from starmerge_models.events import emit
from starmerge_models.merging.checks import check_weights
from starmerge_models.merging.executors.executor import Executor, FunctionJob
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.journal import JOURNAL, Journal, fingerprint
from starmerge_models.merging.layout import PlannedTensor
from starmerge_models.merging.outputs import Writing
from starmerge_models.merging.plan import Plan, make_plan
from starmerge_models.merging.provenance import Key, input_hashes, key_of
from starmerge_models.merging.report import (
    MergeReport,
    hashes_beside,
    hashes_of_contents,
    make_report,
)
from starmerge_models.merging.work import Done, LookJob, WriteJob
from starmerge_models.methods.method import Deltas, Method, TensorContext
from starmerge_models.methods.pipeline import Pipeline, as_pipeline
from starmerge_models.progress import Progress, progress_bar
from starmerge_models.reading import read_json
from starmerge_models.recipe import Dtype, OutputKind, make_recipe, model_entries, reference
from starmerge_models.storage import Place, place_of, storage_of
from starmerge_models.storage.publishing import REPORT, printable
from starmerge_models.storage.storage import MARK

_Seen = TypeVar("_Seen")


@dataclass(frozen=True, repr=False)
class MergeResult:
    """A finished merge. A notebook shows where it is and what it did."""

    path: Place
    """The folder of the merged model, or the file of an adapter."""
    report: MergeReport
    taken_up: int = 0
    """Tensors that an earlier run, which was killed, had written."""

    def __repr__(self) -> str:
        """Return the place and the report's summary."""
        return f"MergeResult in {self.path}: {self.report!r}"

    def _repr_html_(self) -> str:
        """Return the place and the report's summary for a notebook."""
        return f"<p><code>{html.escape(str(self.path))}</code></p>{self.report._repr_html_()}"


def merge(
    base: str | Path | None,
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    method: Method | Pipeline | str = "star",
    *,
    output: str | Path,
    weights: Sequence[float] | None = None,
    metric: str | Path | None = None,
    tokenizer: str | Path = "base",
    chat_template: str | Path | None = None,
    dtype: Dtype = "keep",
    output_kind: OutputKind | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    any_base: bool = False,
    common: bool = False,
    overwrite: bool = False,
    fresh: bool = False,
    threads: int | None = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> MergeResult:
    """Merge fine-tunes of one base into a model that ``transformers`` loads, or into an adapter.

    The folder appears when it is complete. Its bytes do not depend on ``threads`` and ``memory``.

    Args:
        base: The base model: a folder, a URL such as ``s3://bucket/model``, or a Hub id
            ``org/name`` or ``org/name@revision``. None: adapters alone are merged into an adapter.
        models: LoRA adapters and full fine-tunes, as folders, files of adapters, URLs or Hub ids;
            a mapping gives them names.
        method: A method such as ``Star(eta=40)``, a chain of some, or a name such as "star+ties".
        output: The folder to create, or its URL in an object store; a file, ending in .safetensors
            or .gguf, for adapters of diffusion models and of llama.cpp.
        weights: Factors of the task vectors, one for each model; by default all are 1.
        metric: A file of :func:`starmerge_models.calibrate` for this base: spectral methods then
            merge in whitened inputs.
        tokenizer: The output's: "base"; "union", which adds the tokens of all models; the name of
            a model, or a folder or Hub id with a tokenizer.
        chat_template: The output's: "base", the name of a model, a Jinja file, or a folder or Hub
            id with a tokenizer; by default the tokenizer's own.
        dtype: Dtype of the floating-point tensors; "keep" keeps each as it is.
        output_kind: "model"; "adapter" for a LoRA adapter in PEFT's layout or, of diffusion models,
            in that of the merged adapters; "gguf" for one for llama.cpp; by default a model, or of
            ``emr`` its unified vector with masks.
        rank: The highest rank of an adapter; by default as high as its updates need.
        max_error: Refuse an adapter whose update is farther from the merge's, in the Frobenius norm
            relative to it.
        any_base: Accept models whose config names another base, or differs from the base's.
        common: Merge what the models share with the base: heads and towers that one side lacks are
            the base's.
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
        ``sm.merge("base", ["a", "b"], sm.Star(eta=40), output="merged")``
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
            "tokenizer": str(tokenizer),
            "chat_template": None if chat_template is None else str(chat_template),
            "dtype": dtype,
            "output": {"kind": output_kind, "rank": rank, "max_error": max_error},
            "any_base": any_base,
            "common": common,
        }
    )
    plan = make_plan(recipe, place_of(output), overwrite=overwrite)
    return run(plan, Threads(threads, memory), fresh=fresh, progress=progress)


def run(
    plan: Plan,
    executor: AbstractContextManager[Executor],
    *,
    fresh: bool = False,
    progress: bool = False,
) -> MergeResult:
    """Carry out a plan; see :func:`merge`.

    Args:
        plan: The plan.
        executor: What does the work on tensors; it is opened and closed here.
        fresh: Begin anew, instead of going on with what a killed run has left.
        progress: Show progress bars on standard error.

    Raises:
        StarmergeError: A NaN or an infinity, in an input or by overflow of the output's dtype; a
            file that is shorter than it was. Nothing is left at the plan's output.
    """
    own = fingerprint(plan)
    storage = storage_of(plan.path)
    if fresh:
        storage.forget(plan.path, suffix=own)
    with ExitStack() as opened:
        # A cluster that cannot be reached must not end the output, of which an earlier run may
        # have written a part.
        workers = opened.enter_context(executor)
        is_shared = workers.spans_machines
        storage.check_room(plan.path, plan.bytes_to_write, suffix=own, is_shared=is_shared)
        publishing = storage.publish(
            plan.path,
            overwrite=plan.overwrite,
            suffix=own,
            member=plan.output.member,
            progress=progress,
            distribute=partial(_distribute, workers) if is_shared else None,
        )
        folder = opened.enter_context(publishing)
        if folder.is_complete:
            report = MergeReport(read_json(folder.place(REPORT)))
            return MergeResult(plan.path, report, len(plan.tensors))
        emit(_planned(plan, workers, own))
        merging = Merging(plan, workers, progress)
        if is_shared:
            folder = folder.shared()
        writing = plan.output.lay_out(plan, folder)
        text = secrets.token_hex(16)
        mark = (folder.mark(text), text) if is_shared else None
        with Journal(folder, writing) as journal:
            merging.write(writing, journal=journal, mark=mark, hashes_inputs=True)
        folder.delete(MARK)
        finished = writing.finish(merging.records, merging.digests)
        hashes = input_hashes(plan, workers, merging.input_digests, progress=progress)
        plan.check_unchanged()
        report = make_report(
            plan, finished, merging.findings, merging.records, hashes, merging.changing
        )
        card = card_of(
            printable(plan.path.name),
            plan.base,
            plan.models,
            plan.recipe.to_yaml(),
            f"{report.summary()} {plan.output.usage(plan, printable(plan.path.name))}".rstrip(),
            library=plan.output.library(plan),
            metric=None if plan.metric is None else plan.metric.file.name,
        )
        folder.put(CARD, card.encode())
        report.content["files"] = sorted({*folder.names(), REPORT} - {JOURNAL})
        report.content["contents"] = hashes_of_contents(finished)
        report.content["blake3"] = hashes_beside(folder, report.content)
        folder.put(REPORT, json_bytes(report.content))
        journal.end()
    return MergeResult(plan.path, report, merging.taken_up)


def _distribute(
    workers: Executor, work: Callable[[int], None], memory: Sequence[int]
) -> Iterator[None]:
    """Have workers do what a storage wants done; see :data:`Distribute`."""
    return workers.run(FunctionJob(work, memory.__getitem__), range(len(memory)))


def _planned(plan: Plan, workers: Executor, own: str) -> events.Plan:
    """Return what is told of a plan when it is carried out.

    Args:
        plan: The plan.
        workers: What carries it out.
        own: The plan's fingerprint.
    """
    return events.Plan(
        base=plan.recipe.base,
        models=[model.name for model in plan.models],
        method=plan.recipe.method,
        tensors=len(plan.tensors),
        merged=len(plan.merged),
        bytes_to_read=plan.bytes_to_read,
        bytes_to_write=plan.bytes_to_write,
        threads=workers.threads,
        memory=workers.memory,
        output=str(plan.path),
        fingerprint=own,
    )


class Merging:
    """A plan being carried out.

    Args:
        plan: The plan.
        executor: What carries it out.
        progress: Show progress bars on standard error.
    """

    def __init__(self, plan: Plan, executor: Executor, progress: bool) -> None:
        self._plan, self._executor, self._progress = plan, executor, progress
        self._checked: dict[int, frozenset[int]] = {}
        self._mark: tuple[Place, str] | None = None
        """See :class:`~starmerge_models.merging.work.TensorJob`."""
        self.changing: set[int] = set()
        """Numbers of the models of which some task vector that was read is not zero."""
        self.findings: dict[str, Any] = {}
        """What the methods found in the whole model."""
        self.records: list[dict[str, Any]] = []
        """Of the tensors that are merged, in the order of the plan."""
        self.digests: dict[str, list[str]] = {}
        """BLAKE3 of what lies in the slots of each tensor, by the tensor's name."""
        self.input_digests: dict[Key, str] = {}
        """BLAKE3 of the tensors that were read, where they were asked for."""
        self.taken_up = 0
        """Tensors that an earlier run had finished."""
        self._surveys = 0
        """Passes over the model that the methods have begun."""

    def write(
        self,
        writing: Writing,
        *,
        journal: Journal | None = None,
        mark: tuple[Place, str] | None = None,
        numbers: Sequence[int] | None = None,
        hashes_inputs: bool = False,
    ) -> None:
        """Merge tensors and write them.

        Args:
            writing: The output.
            journal: Knows what an earlier run has written, and is told what is.
            mark: Where other machines fill the output, too: a file in it, and a text in that.
            numbers: Of some of the plan's tensors; by default all. Methods see the whole model in
                any case.
            hashes_inputs: Hash the inputs as they are read.
        """
        plan = self._plan
        self._mark = mark
        prepared = plan.pipeline.prepare(self._walk)
        self.findings = prepared.findings
        job = WriteJob(
            plan,
            self._checked,
            prepared=prepared,
            writing=writing,
            known={} if journal is None else journal.known,
            hashes_inputs=hashes_inputs,
            mark=self._mark,
        )
        wanted = range(len(plan.tensors)) if numbers is None else numbers
        size = sum(plan.output.nbytes(plan.tensors[number]) for number in wanted)
        with (
            self._phase("merging", size, len(wanted)) as phase,
            closing(self._executor.run(job, wanted)) as written,
        ):
            for number, done in zip(wanted, written, strict=True):
                tensor = plan.tensors[number]
                self._note(tensor, done)
                if journal is not None and not done.taken_up:
                    journal.add(tensor, done)
                phase.tensor_done(tensor.source.name, plan.output.nbytes(tensor), done.seconds)

    def _note(self, tensor: PlannedTensor, done: Done) -> None:
        self.changing.update(done.changing)
        self.digests[tensor.source.name] = done.digests
        self.taken_up += done.taken_up
        if done.record is not None:
            self.records.append(done.record)
        if done.inputs:
            keys = map(key_of, tensor.stored_inputs)
            self.input_digests.update(zip(keys, done.inputs, strict=True))

    def _walk(self, look: Callable[[Deltas, TensorContext], _Seen]) -> Iterator[_Seen]:
        """Yield what ``look`` returns for each tensor that some model changes."""
        plan = self._plan
        job = LookJob(plan, dict(self._checked), mark=self._mark, look=look)
        numbers = [number for number, tensor in enumerate(plan.tensors) if tensor.models]
        size = sum(map(job.nbytes, numbers))
        with (
            self._phase("surveying", size, len(numbers)) as phase,
            closing(self._executor.run(job, numbers)) as looked,
        ):
            self._surveys += 1
            passes = max(plan.pipeline.passes, self._surveys)
            if passes > 1:
                phase.waits_for(f"pass {self._surveys} of {passes}")
            for number, found in zip(numbers, looked, strict=True):
                self._checked[number] = found.checked
                self.changing.update(found.changing)
                yield found.seen
                name = plan.tensors[number].source.name
                phase.tensor_done(name, job.nbytes(number), found.seconds)

    def _phase(self, name: str, size: int, tensors: int) -> AbstractContextManager[Progress]:
        return progress_bar(name, size, show=self._progress, in_bytes=True, tensors=tensors)
