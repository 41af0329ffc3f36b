"""The merge of files: a pass over the base's tensors, several at the same time."""

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
from starmerge_models.merging.work import SurveyJob, TensorResult, WriteJob
from starmerge_models.methods.method import Deltas, Method, TensorContext
from starmerge_models.methods.pipeline import Pipeline, as_pipeline
from starmerge_models.progress import Progress, progress_bar
from starmerge_models.reading import read_json
from starmerge_models.recipe import Dtype, OutputKind, make_recipe, model_entries, reference
from starmerge_models.storage import Place, place_of, storage_of
from starmerge_models.storage.publishing import REPORT, printable
from starmerge_models.storage.storage import MARK

_Result = TypeVar("_Result")


@dataclass(frozen=True, repr=False)
class MergeResult:
    """A finished merge. A notebook shows where it is and what it did."""

    path: Place
    """The folder of the merged model, or the file of an adapter."""
    report: MergeReport
    resumed: int = 0
    """Number of tensors that an earlier, killed run had written."""

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
            ``org/name`` or ``org/name@revision``. None merges adapters into an adapter without the
            base.
        models: LoRA adapters and full fine-tunes, as folders, files of adapters, URLs or Hub ids;
            a mapping gives them names.
        method: A method such as ``Star(eta=40)``, a chain, or a name such as "star+ties".
        output: The folder to create, or its URL in an object store; a file, ending in .safetensors
            or .gguf, for adapters of diffusion models and of llama.cpp.
        weights: Factors of the task vectors, one for each model; by default all are 1.
        metric: A file of :func:`starmerge_models.calibrate` for this base: spectral methods then
            merge in whitened inputs.
        tokenizer: The output's: "base"; "union", which adds the tokens of all models; the name of
            a model, or a folder or Hub id with a tokenizer.
        chat_template: The output's chat template: "base", the name of a model, a Jinja file, or a
            folder or Hub id with a tokenizer; by default that of the output's tokenizer.
        dtype: Dtype of the floating-point tensors; "keep" keeps the dtype of each tensor.
        output_kind: "model"; "adapter" for a LoRA adapter in PEFT's layout or, for diffusion
            models, in that of the merged adapters; "gguf" for an adapter for llama.cpp; by default
            a model, or for ``emr`` its unified vector with masks.
        rank: The highest rank of an adapter; by default as high as its updates need.
        max_error: Refuse an adapter whose relative error of the update, in the Frobenius norm, is
            larger.
        any_base: Accept models whose config names another base, or differs from the base's.
        common: Merge only the tensors that models and base have in common; heads and towers that
            only one of them has are those of the base.
        overwrite: Replace an existing output.
        fresh: Restart. By default the merge resumes a killed merge of the same inputs, recipe and
            output, and keeps the tensors that it had written; the resulting bytes are the same.
        threads: Number of tensors that are merged at the same time, each by one thread; by default
            the number of processors, or OMP_NUM_THREADS.
        memory: Limit in bytes for all tensors that are merged at the same time, or a text such as
            "4GB"; by default a quarter of the machine's memory. A tensor that needs more is merged
            alone.
        progress: Show a progress bar on standard error.

    Raises:
        UsageError: An argument is wrong; nothing was read or written.
        StarmergeError: An input is broken or does not fit; no output is left.

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
    """Run a plan; see :func:`merge`.

    Args:
        plan: The plan.
        executor: The executor of the work on tensors; this function opens and closes it.
        fresh: Restart instead of resuming a killed run.
        progress: Show progress bars on standard error.

    Raises:
        StarmergeError: A NaN or an infinity, in an input or by overflow of the output's dtype; a
            file that has become shorter. No output is left.
    """
    own = fingerprint(plan)
    storage = storage_of(plan.path)
    if fresh:
        storage.delete_partial(plan.path, suffix=own)
    with ExitStack() as opened:
        # Connect to the cluster first: if this fails, the partial output of an earlier run must
        # not be deleted.
        workers = opened.enter_context(executor)
        is_shared = workers.spans_machines
        storage.check_free_space(plan.path, plan.bytes_to_write, suffix=own, is_shared=is_shared)
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
        emit(_plan_event(plan, workers, own))
        merging = MergeRun(plan, workers, progress)
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
    return MergeResult(plan.path, report, merging.resumed)


def _distribute(
    workers: Executor, work: Callable[[int], None], memory: Sequence[int]
) -> Iterator[None]:
    """Run a storage's work on the workers; see :data:`Distribute`."""
    return workers.run(FunctionJob(work, memory.__getitem__), range(len(memory)))


def _plan_event(plan: Plan, workers: Executor, own: str) -> events.Plan:
    """Return the event that announces a plan.

    Args:
        plan: The plan.
        workers: The executor of the plan.
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


class MergeRun:
    """The state of a running plan.

    Args:
        plan: The plan.
        executor: The executor of the plan.
        progress: Show progress bars on standard error.
    """

    def __init__(self, plan: Plan, executor: Executor, progress: bool) -> None:
        self._plan, self._executor, self._progress = plan, executor, progress
        self._checked: dict[int, frozenset[int]] = {}
        self._mark: tuple[Place, str] | None = None
        """See :class:`~starmerge_models.merging.work.TensorJob`."""
        self.changing: set[int] = set()
        """Numbers of the models with a nonzero task vector among those read so far."""
        self.findings: dict[str, Any] = {}
        """The methods' surveys of the whole model."""
        self.records: list[dict[str, Any]] = []
        """Records of the merged tensors, in the order of the plan."""
        self.digests: dict[str, list[str]] = {}
        """BLAKE3 of the content of each tensor's slots, by the tensor's name."""
        self.input_digests: dict[Key, str] = {}
        """BLAKE3 of the tensors that were read, if requested."""
        self.resumed = 0
        """Number of tensors that an earlier run had finished."""
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
            journal: Journal with the tensors of an earlier run, to which finished tensors are
                added.
            mark: For outputs that several machines write: a file of the output, and its text.
            numbers: Numbers of the tensors to merge; by default all. Surveys of methods cover the
                whole model in any case.
            hashes_inputs: Hash the inputs when they are read.
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
                if journal is not None and not done.resumed:
                    journal.add(tensor, done)
                phase.tensor_done(tensor.source.name, plan.output.nbytes(tensor), done.seconds)

    def _note(self, tensor: PlannedTensor, done: TensorResult) -> None:
        self.changing.update(done.changing)
        self.digests[tensor.source.name] = done.digests
        self.resumed += done.resumed
        if done.record is not None:
            self.records.append(done.record)
        if done.inputs:
            keys = map(key_of, tensor.stored_inputs)
            self.input_digests.update(zip(keys, done.inputs, strict=True))

    def _walk(self, visit: Callable[[Deltas, TensorContext], _Result]) -> Iterator[_Result]:
        """Yield ``visit(deltas, tensor)`` for each tensor that some model changes."""
        plan = self._plan
        job = SurveyJob(plan, dict(self._checked), mark=self._mark, visit=visit)
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
                yield found.value
                name = plan.tensors[number].source.name
                phase.tensor_done(name, job.nbytes(number), found.seconds)

    def _phase(self, name: str, size: int, tensors: int) -> AbstractContextManager[Progress]:
        return progress_bar(name, size, show=self._progress, in_bytes=True, tensors=tensors)
